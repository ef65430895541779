"""Commands on parts of a model: `split`, `join`."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from modelpress.cli.common import Bar, JsonOption, StoreOption, app, echo, opened_store, parse_pack, rows_table


@app.command()
def split(
    folder: Annotated[Path, typer.Argument(help="A Hugging Face folder: safetensors, config, tokenizer.")],
    to: Annotated[Path, typer.Option("--to", help="Folder for the pieces: trunk, and one for each part.")],
    part: Annotated[
        list[str], typer.Option("--part", help="NAME=MODULE, such as head=classifier; globs; may be repeated.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Split a model into a trunk and parts (heads, adapters, experts), each to be published by itself."""
    from modelpress.errors import ConfigError
    from modelpress.submodels import split as run

    parts: dict[str, list[str]] = {}
    for text in part:
        name, equals, pattern = text.partition("=")
        if not equals or not name or not pattern:
            raise ConfigError("reading --part", found=repr(text), expected="NAME=MODULE, such as head=classifier")
        parts.setdefault(name, []).append(pattern)
    with Bar("split") as progress:
        report = run(folder, parts, to, progress)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    rows = [
        {"piece": row.piece, "tensors": str(row.tensors), "bytes": f"{row.size_bytes:,}", "folder": row.folder}
        for row in report.pieces
    ]
    echo(rows_table(rows))
    echo(f"trunk {report.trunk}")


@app.command()
def join(
    pieces: Annotated[
        list[str], typer.Argument(metavar="PIECE...", help="The trunk and its parts: folders, or packs NAME[@REF].")
    ],
    to: Annotated[Path, typer.Option("--to", help="Folder to write the model into.")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Join a trunk and its parts to one model; parts of another trunk are refused."""
    from modelpress import load
    from modelpress.submodels import join as run

    with ExitStack() as stack:
        folders = []
        for number, text in enumerate(pieces):
            folder = Path(text)
            if not folder.is_dir():
                name, ref = parse_pack(text)
                scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="modelpress-"))
                folder = Path(scratch, f"piece-{number}")
                with Bar(f"pull {text}") as progress:
                    load.pull(opened_store(store), name, ref, folder, "huggingface", progress)
            folders.append(folder)
        with Bar("join") as progress:
            report = run(folders, to, progress)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    echo(f"{report.tensors} tensors, {report.size_bytes:,} bytes → {to}")
    echo(f"{len(report.changed)} tensors are not the bits that were split off" if report.changed else "bit for bit")
