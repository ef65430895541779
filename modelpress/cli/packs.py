"""Commands on published packs: `pull`, `verify`, `inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from modelpress.cli.common import (
    Bar,
    JsonOption,
    PackArgument,
    StoreOption,
    app,
    echo,
    opened_store,
    parse_pack,
    rows_table,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

    from modelpress.manifest import Manifest
    from modelpress.store import Store


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

    name, ref = parse_pack(pack)
    with Bar("pull") as progress:
        digest = load.pull(opened_store(store), name, ref, to, layout, progress)
    echo(f"{name} {digest} → {to}")


@app.command()
def verify(pack: PackArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Read a whole pack again from the store and check every digest in it."""
    from modelpress import load

    name, ref = parse_pack(pack)
    with Bar("verify") as progress:
        report = load.verify(opened_store(store), name, ref, progress)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    echo(f"{name} {report.pack}: every digest holds")
    for key, value in report.metrics().items():
        echo(f"  {key} {value:,.10g}")


@app.command()
def inspect(
    pack: PackArgument,
    tensor: Annotated[str | None, typer.Option(help="One tensor in full: its streams, and why this codec.")] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a pack holds: tensors, codecs, bits per weight against the entropy bound, which codec lost, files."""
    from modelpress import explain, load

    name, ref = parse_pack(pack)
    opened = opened_store(store)
    digest = load.resolve(opened, name, ref)
    manifest = load.load_manifest(opened, name, digest)
    fetch = _fetcher(opened, manifest, needed=tensor is not None)
    entry = explain.find_tensor(manifest, tensor) if tensor is not None else None
    choices = explain.read_choices(manifest, fetch) if fetch else {}
    if entry is not None and fetch:
        found = explain.describe(manifest, entry, choices.get(entry.name), fetch)
        typer.echo(json.dumps({"pack": digest} | found, indent=2) if as_json else "\n".join(explain.lines(found)))
        return
    if as_json:
        chosen = {row: choice.model_dump(mode="json", exclude={"decode_seconds"}) for row, choice in choices.items()}
        document = {"pack": digest, "manifest": manifest.model_dump(mode="json"), "choices": chosen}
        typer.echo(json.dumps(document, indent=2))
        return
    echo(f"{name} {digest}, {manifest.kind}, format {manifest.format_version}, licence {manifest.licence}")
    if manifest.encryption:
        with_reports = "" if fetch else "; no key in the settings opens it, so without how codecs were chosen"
        echo(f"encrypted: {manifest.encryption.algorithm}, secret {manifest.encryption.secret}{with_reports}")
    echo(rows_table(explain.table(manifest, choices)))
    echo(explain.codec_counts(manifest))
    echo(_blob_table(manifest))
    ratio = manifest.raw_bytes / manifest.published_bytes
    echo(f"{manifest.raw_bytes:,} bytes raw, {manifest.published_bytes:,} published: compression ratio {ratio:.2f}")


def _fetcher(store: Store, manifest: Manifest, *, needed: bool) -> Callable[[str], bytes] | None:
    """What reads the pack's blobs; None where no key opens them, unless they are needed."""
    from modelpress import load
    from modelpress.errors import EncryptionKeyError

    try:
        return load.fetcher(store, manifest)
    except EncryptionKeyError:
        if needed:
            raise
        return None


def _blob_table(manifest: Manifest) -> Table:
    files = [*manifest.files, *([manifest.reports] if manifest.reports else [])]
    shards = [("shard", shard.sha256, shard.size_bytes, shard.size_bytes) for shard in manifest.shards]
    others = [(f"{file.name} ({file.codec})", file.stored_sha256, file.size_bytes, file.stored_bytes) for file in files]
    rows = [
        {"blob": what, "sha256": digest, "raw bytes": f"{raw:,}", "stored bytes": f"{stored:,}"}
        for what, digest, raw, stored in [*shards, *others]
    ]
    return rows_table(rows or [{"blob": "none"}])
