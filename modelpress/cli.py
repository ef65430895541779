"""The command line: one door to all parts. Each command imports what it needs when it runs, so that help is quick."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from modelpress.errors import GateError, ModelpressError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from modelpress.manifest import Manifest
    from modelpress.progress import Progress
    from modelpress.settings import Settings
    from modelpress.store import Store

CHAMPION = "champion"
WIDTH = 400
STATUS_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}

app = typer.Typer(
    name="modelpress",
    help="From a trained PyTorch model to a smaller, faster, verified one in the bucket, the registry and the server.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

PackArgument = Annotated[str, typer.Argument(metavar="NAME[@REF]", help="Pack name; REF is an alias or a digest.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Pack name.")]
StoreOption = Annotated[str | None, typer.Option("--store", help="s3://bucket/prefix or a folder [MODELPRESS_STORE].")]
AliasOption = Annotated[str, typer.Option("--alias", help="The pointer.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit. Known errors become a message and the exit code of their kind."""
    try:
        app(args=list(arguments) if arguments is not None else None)
    except ModelpressError as error:
        typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
        typer.echo(str(error), err=True)
        sys.exit(error.exit_code)
    except Exception:  # noqa: BLE001  the last resort: what nobody foresaw keeps its traceback
        traceback.print_exc()
        typer.echo("error: unforeseen; this is a fault of modelpress, please report the lines above", err=True)
        sys.exit(1)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="A YAML recipe, such as configs/digits.yaml.")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the whole line: optimise, publish, register, judge, promote."""
    from modelpress.config import load_config

    checked = load_config(config)  # before the orchestrator's seconds of start-up
    _export_store(store)
    from flows.console import terminal

    with terminal():
        from flows.optimize import optimize
        from flows.result import table

        result = optimize(checked)
    if as_json:
        typer.echo(result.model_dump_json(indent=2))
    else:
        _print(_rows_table(table(result.stages)))
        _print(f"pack {result.pack}\n{result.source_bytes:,} → {result.published_bytes:,} bytes, {result.uri}")
    if result.decision is None:
        return
    if not result.decision.promote:
        raise GateError(
            f"promoting {result.name}",
            found="; ".join(result.decision.reasons),
            fix="the pack is published and the champion is who it was; read the report, then change the recipe",
        )
    if not as_json:
        _print(f"{result.name}@{checked.gate.alias} is this pack now: modelpress serve {result.name}")


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe: name, workload, and perhaps export, plan, compress.")],
    to: Annotated[Path, typer.Option("--to", help="Folder for checkpoint, report and plot.")] = Path("plan"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the weights, what they may become and how much is to be measured.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Give each weight its own bits: the fewest coded bytes within one budget of disagreement with the float graph."""
    from modelpress.config import load_plan_recipe

    checked = load_plan_recipe(recipe)
    from modelpress import plan as planning
    from modelpress.export import export
    from modelpress.plan import show
    from modelpress.workload import check_disjoint, load_workload

    workload = load_workload(checked.workload)
    check_disjoint(workload)
    if not dry_run:
        show.check_folder(to, checked.name)
    with _Bar("source") as progress:
        # A dry run looks at shapes: nothing is trained for it.
        untrained = dry_run and workload.trains_source
        source = workload.skeleton({}) if untrained else workload.source(progress)
    exported, _ = export(source, workload, checked.export)
    if dry_run:
        outlined = planning.outline(exported, workload, checked.plan)
        if as_json:
            typer.echo(json.dumps([one.model_dump(mode="json") for one in outlined], indent=2))
            return
        _print(_rows_table(show.outline(outlined)))
        _print(show.effort(outlined, checked.plan))
        return
    with _Bar("plan") as progress:
        if checked.plan.needs_module:
            from modelpress.plan.recovery import plan_module

            made, report = plan_module(
                source, exported, workload, checked.plan, checked.export, checked.compress, progress
            )
        else:
            made, report = planning.plan(exported, workload, checked.plan, checked.compress, progress)
    written = show.write(made, report, to, checked.name)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    _print(_rows_table(show.tensors(report)))
    _print(_rows_table(show.points(report)))
    _print(show.summary(report))
    _print("wrote " + ", ".join(map(str, written)))


@app.command()
def quantize(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe: workload, quantize and perhaps max_shard_size.")],
    to: Annotated[Path, typer.Option("--to", help="Folder to write; a new or empty one.")],
    layout: Annotated[  # noqa: ARG001  the one there is; others may follow
        Literal["compressed-tensors"],
        typer.Option("--as", help="compressed-tensors: a Hugging Face folder as vLLM and transformers read it."),
    ] = "compressed-tensors",
    as_json: JsonOption = False,
) -> None:
    """Write a Hugging Face model with its linear weights in 4 or 8 bits, or float8; activations stay in float."""
    from modelpress.config import load_quantize_recipe

    checked = load_quantize_recipe(recipe)
    from modelpress import compressed_tensors, hf_writer
    from modelpress.workload import check_disjoint, load_workload

    compressed_tensors.check_config(checked.quantize)  # before hours are spent
    hf_writer.check_folder(to)
    workload = load_workload(checked.workload)
    check_disjoint(workload)
    with _Bar("source") as progress:
        source = workload.source(progress)
    with _Bar("quantize") as progress:
        report = compressed_tensors.deliver(source, workload, checked.quantize, to, checked.max_shard_size, progress)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    _print(f"{report.summary()}\nwrote {to}")


@app.command()
def blockwise(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe: workload, and prune or quantize.")],
    to: Annotated[Path, typer.Option("--to", help="Folder to make, in the layout of Hugging Face.")],
    as_json: JsonOption = False,
) -> None:
    """Prune or quantize a model larger than memory: from a folder into another, one block at a time."""
    from modelpress.config import load_blockwise_recipe

    checked = load_blockwise_recipe(recipe)
    from modelpress.blockwise import run_recipe, table
    from modelpress.blockwise.folder import check_new

    check_new(to)
    with _Bar("blockwise") as progress:
        report = run_recipe(checked, to, progress)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    _print(_rows_table(table(report)))
    _print(f"{report.method}: {report.coverage:.1%} of the eligible weights → {to}")


@app.command()
def pull(
    pack: PackArgument,
    to: Annotated[Path, typer.Option("--to", help="Folder to write into.")],
    layout: Annotated[
        Literal["checkpoint", "onnx"],
        typer.Option("--as", help="checkpoint: safetensors files; onnx: a graph with external data."),
    ] = "checkpoint",
    store: StoreOption = None,
) -> None:
    """Fetch a pack, check every byte, and write it in a layout that other tools read."""
    from modelpress import load

    name, ref = _parse_pack(pack)
    with _Bar("pull") as progress:
        digest = load.pull(_open_store(store), name, ref, to, layout, progress)
    _print(f"{name} {digest} → {to}")


@app.command()
def verify(pack: PackArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Read a whole pack again from the store and check every digest in it."""
    from modelpress import load

    name, ref = _parse_pack(pack)
    with _Bar("verify") as progress:
        report = load.verify(_open_store(store), name, ref, progress)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    _print(f"{name} {report.pack}: every digest holds")
    for key, value in report.metrics().items():
        _print(f"  {key} {value:,.10g}")


@app.command()
def inspect(
    pack: PackArgument,
    tensor: Annotated[str | None, typer.Option(help="One tensor in full: its streams, and why this codec.")] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a pack holds: tensors, codecs, bits per weight against the entropy bound, which codec lost, files."""
    from modelpress import explain, load

    name, ref = _parse_pack(pack)
    opened = _open_store(store)
    digest = load.resolve(opened, name, ref)
    manifest = load.load_manifest(opened, name, digest)
    fetch = load.fetcher(opened, manifest)
    entry = explain.find_tensor(manifest, tensor) if tensor is not None else None
    choices = explain.read_choices(manifest, fetch)
    if entry is not None:
        found = explain.describe(manifest, entry, choices.get(entry.name), fetch)
        typer.echo(json.dumps({"pack": digest} | found, indent=2) if as_json else "\n".join(explain.lines(found)))
        return
    if as_json:
        chosen = {row: choice.model_dump(mode="json", exclude={"decode_seconds"}) for row, choice in choices.items()}
        document = {"pack": digest, "manifest": manifest.model_dump(mode="json"), "choices": chosen}
        typer.echo(json.dumps(document, indent=2))
        return
    _print(f"{name} {digest}, {manifest.kind}, format {manifest.format_version}, licence {manifest.licence}")
    _print(_rows_table(explain.table(manifest, choices)))
    _print(explain.codec_counts(manifest))
    _print(_blob_table(manifest))
    ratio = manifest.raw_bytes / manifest.published_bytes
    _print(f"{manifest.raw_bytes:,} bytes raw, {manifest.published_bytes:,} published: compression ratio {ratio:.2f}")


@app.command()
def promote(
    name: NameArgument,
    candidate: Annotated[str, typer.Argument(help="An alias, a model version's number or a digest.")] = "challenger",
    store: StoreOption = None,
) -> None:
    """Judge a published pack on its own bytes, and move the alias if it passes."""
    _export_store(store)
    from flows.console import terminal

    with terminal():
        from flows.promote import promote as flow

        decision = flow(name, candidate)
    _print(f"{name}: promoted; " + "; ".join(decision.reasons))


@app.command()
def rollback(
    name: NameArgument,
    alias: AliasOption = CHAMPION,
    to: Annotated[str | None, typer.Option(help="Digest to go back to; left out, the pack before.")] = None,
    pointer_only: Annotated[
        bool, typer.Option("--pointer-only", help="Move only what servers follow: for when MLflow or Prefect is down.")
    ] = False,
    store: StoreOption = None,
) -> None:
    """Point an alias back at an earlier pack."""
    if pointer_only:
        from modelpress import load, pointer

        opened = _open_store(store)
        pack = pointer.rollback(opened, name, alias, load.resolve(opened, name, to) if to else None).pack
    else:
        _export_store(store)
        from flows.console import terminal

        with terminal():
            from flows.promote import rollback as flow

            pack = flow(name, alias, to)
    _print(f"{name}@{alias} is pack {pack} again")


@app.command()
def history(
    name: NameArgument, alias: AliasOption = CHAMPION, store: StoreOption = None, as_json: JsonOption = False
) -> None:
    """Show the log of an alias: when, who, why, which pack."""
    from modelpress import pointer
    from modelpress.errors import NotFoundError

    opened = _open_store(store)
    entries = pointer.history(opened, name, alias)
    if as_json:
        typer.echo(json.dumps([entry.model_dump(mode="json") for entry in entries], indent=2))
        return
    if not entries:
        raise NotFoundError(f"reading the log of {name}@{alias} in {opened.uri}", found="no entry")
    rows = [
        {
            "number": str(entry.number),
            "when": entry.created.isoformat(" ", "seconds"),
            "who": entry.who,
            "why": entry.reason,
            "pack": entry.pack,
        }
        for entry in entries
    ]
    _print(_rows_table(rows))


@app.command()
def serve(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME[@ALIAS]]...", help="Empty: every pack with a champion.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.")] = None,
    poll_seconds: Annotated[float | None, typer.Option(help="How often pointers are read; 0 never.")] = None,
    provider: Annotated[str | None, typer.Option(help="ONNX Runtime execution provider.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads per inference; 0 takes all cores.")] = None,
    workers: Annotated[int | None, typer.Option(help="Inferences at a time; 0 takes all cores.")] = None,
    store: StoreOption = None,
) -> None:
    """Serve packs over the Open Inference Protocol v2, and follow their pointers."""
    from serving import main as serving

    serving.configure_log()
    settings = serving.read_settings(
        models=",".join(models) if models else None,
        host=host,
        port=port,
        poll_seconds=poll_seconds,
        provider=provider,
        threads=threads,
        workers=workers,
    )
    serving.run(_settings(store), settings)


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
    for finding in examine(_settings(store), provider or []):
        findings.append(finding)
        if not as_json:
            _print(Text.assemble((f"{finding.status:>4} ", STATUS_STYLES[finding.status]), (finding.check, "bold")))
            _print(Text(f"     {finding.found}" + (f"\n     mend: {finding.fix}" if finding.fix else "")))
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(3)


def _parse_pack(text: str) -> tuple[str, str]:
    name, _, ref = text.partition("@")
    return name, ref or CHAMPION


def _settings(store: str | None) -> Settings:
    _export_store(store)
    from modelpress.settings import read_settings

    return read_settings()


def _export_store(store: str | None) -> None:
    """`--store` is MODELPRESS_STORE for this process: flows and tasks read their settings from the environment."""
    if store is not None:
        os.environ["MODELPRESS_STORE"] = store


def _open_store(store: str | None) -> Store:
    from modelpress.store import open_store

    settings = _settings(store)
    return open_store(settings.store_uri, settings)


def _print(*what: Any) -> None:
    from rich.console import Console

    # A narrow terminal wraps lines; it does not cut digests short.
    Console(highlight=False, soft_wrap=True, width=WIDTH).print(*what, markup=False)


def _rows_table(rows: Sequence[dict[str, str]]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in rows[0]:
        table.add_column(head, no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    return table


def _blob_table(manifest: Manifest) -> Table:
    files = [*manifest.files, *([manifest.reports] if manifest.reports else [])]
    shards = [("shard", shard.sha256, shard.size_bytes, shard.size_bytes) for shard in manifest.shards]
    others = [(f"{file.name} ({file.codec})", file.stored_sha256, file.size_bytes, file.stored_bytes) for file in files]
    rows = [
        {"blob": what, "sha256": digest, "raw bytes": f"{raw:,}", "stored bytes": f"{stored:,}"}
        for what, digest, raw, stored in [*shards, *others]
    ]
    return _rows_table(rows or [{"blob": "none"}])


class _Bar:
    """A progress bar on stderr while a command works; nothing where nobody watches."""

    def __init__(self, what: str) -> None:
        from rich.console import Console
        from rich.progress import Progress as Bar

        self._bar = Bar(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        self._task = self._bar.add_task(what, total=None)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self._show

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _show(self, done: int, total: int, note: str = "") -> None:
        self._bar.update(self._task, completed=done, total=total, description=note or None)


if __name__ == "__main__":
    main()
