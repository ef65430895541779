"""Commands on machines: `serve`, `doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from modelpress.cli.common import JsonOption, StoreOption, app, echo, store_settings

STATUS_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@app.command()
def serve(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME[@ALIAS]]...", help="Empty: every pack with a champion.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Port for gRPC; 0: no gRPC.")] = None,
    poll_seconds: Annotated[float | None, typer.Option(help="How often pointers are read; 0 never.")] = None,
    provider: Annotated[str | None, typer.Option(help="ONNX Runtime execution provider.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of each; 0 shares the cores among --workers.")] = None,
    workers: Annotated[int | None, typer.Option(help="Inferences at a time; 0 takes all cores.")] = None,
    keys_file: Annotated[Path | None, typer.Option(help="File of hashed keys; see `modelpress access`.")] = None,
    open_to_all: Annotated[
        bool | None, typer.Option("--open", help="Answer everybody without a key, also beyond this machine.")
    ] = None,
    store: StoreOption = None,
) -> None:
    """Serve packs over the Open Inference Protocol v2, and follow their pointers."""
    from serving import main as serving

    serving.configure_log()
    settings = serving.read_settings(
        models=",".join(models) if models else None,
        host=host,
        port=port,
        grpc_port=grpc_port,
        poll_seconds=poll_seconds,
        provider=provider,
        threads=threads,
        workers=workers,
        keys_file=keys_file,
        open=open_to_all or None,
    )
    serving.run(store_settings(store), settings)


@app.command()
def doctor(
    provider: Annotated[
        list[str] | None, typer.Option(help="Execution provider that must be usable; may be repeated.")
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check this machine, the store and the servers, and say how to mend each."""
    from dataclasses import asdict

    from rich.text import Text

    from modelpress.doctor import examine

    findings = []
    for finding in examine(store_settings(store), provider or []):
        findings.append(finding)
        if not as_json:
            echo(Text.assemble((f"{finding.status:>4} ", STATUS_STYLES[finding.status]), (finding.check, "bold")))
            echo(Text(f"     {finding.found}" + (f"\n     mend: {finding.fix}" if finding.fix else "")))
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(3)
