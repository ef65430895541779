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
    from collections.abc import Sequence

    from rich.table import Table

    from modelpress.load import Parts
    from modelpress.manifest import Manifest
    from modelpress.store import Store


@app.command()
def pull(
    pack: PackArgument,
    to: Annotated[Path, typer.Option("--to", help="Folder to write into.")],
    layout: Annotated[
        Literal["checkpoint", "huggingface", "compressed-tensors", "onnx", "triton", "vitis-ai"],
        typer.Option("--as", help="See above."),
    ] = "checkpoint",
    store: StoreOption = None,
) -> None:
    """Fetch a pack, check every byte, and write it in a layout that other tools read.

    \b
    checkpoint          tensors as safetensors, and the pack's files
    huggingface         the folder that was published, byte for byte
    compressed-tensors  the same, and surely one that vLLM reads
    onnx                model.onnx with external data
    triton              a Triton model repository: NAME/config.pbtxt, NAME/1/model.onnx
    vitis-ai            model.onnx for a DPU: one sample a run, powers of two as scales
    """
    from modelpress import load

    name, ref = parse_pack(pack)
    with Bar("pull") as progress:
        digest = load.pull(opened_store(store), name, ref, to, layout, progress)
    echo(f"{name} {digest} → {to}")


@app.command()
def verify(
    target: Annotated[
        str | None,
        typer.Argument(metavar="[STORE] [NAME[@REF]]", help="A store (s3://…, or a path with /), a pack, or both."),
    ] = None,
    pack: Annotated[str | None, typer.Argument(hidden=True)] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read a whole pack again and check every digest and signature; without a pack, everything in the store."""
    if target is not None and ("/" in target or pack is not None):
        store, target = target, pack
    if target is None:
        _verify_store(store, as_json)
        return
    from modelpress import load

    name, ref = parse_pack(target)
    with Bar("verify") as progress:
        report = load.verify(opened_store(store), name, ref, progress)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    echo(f"{name} {report.pack}: every digest holds")
    echo(f"  {_signed_line(report.signed_by)}")
    for key, value in report.metrics().items():
        echo(f"  {key} {value:,.10g}")


def _verify_store(store: str | None, as_json: bool) -> None:
    from modelpress import scrub

    with Bar("verify") as progress:
        report = scrub.scrub(opened_store(store), progress=progress)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        rows = [
            {"name": row.name, "digest": row.digest, "blobs": str(row.blobs), "signatures": row.signed_by}
            for row in report.packs
        ]
        echo(rows_table(rows or [{"name": "no packs"}]))
        echo(
            f"{report.uri}: {len(report.packs)} packs, {report.aliases} aliases, {report.signatures} signatures, "
            f"{report.decisions} decisions, {report.runs} runs, {report.blobs} blobs of {report.blob_bytes:,} bytes"
        )
        for finding in report.findings:
            echo(f"  {finding.line()}")
    scrub.check(report)


def _signed_line(signed_by: Sequence[str] | None) -> str:
    if signed_by is None:
        return "signatures: not checked, there is no trust file (MODELPRESS_TRUST)"
    return f"signed by {', '.join(signed_by)}"


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
    signed = [one.line() for one in load.check_trust(opened, name, digest)] if opened.trust else None
    parts = _parts(opened, manifest, needed=tensor is not None)
    entry = explain.find_tensor(manifest, tensor) if tensor is not None else None
    choices = explain.read_choices(manifest, parts.fetch) if parts else {}
    if entry is not None and parts:
        found = explain.describe(manifest, entry, choices.get(entry.name), parts.fetch, parts.base)
        typer.echo(json.dumps({"pack": digest} | found, indent=2) if as_json else "\n".join(explain.lines(found)))
        return
    if as_json:
        chosen = {row: choice.model_dump(mode="json", exclude={"decode_seconds"}) for row, choice in choices.items()}
        document = {
            "pack": digest,
            "signed_by": signed,
            "manifest": manifest.model_dump(mode="json"),
            "choices": chosen,
        }
        typer.echo(json.dumps(document, indent=2))
        return
    echo(f"{name} {digest}, {manifest.kind}, format {manifest.format_version}, licence {manifest.licence}")
    echo(_signed_line(signed))
    if manifest.encryption:
        with_reports = "" if parts else "; no key in the settings opens it, so without how codecs were chosen"
        echo(f"encrypted: {manifest.encryption.algorithm}, secret {manifest.encryption.secret}{with_reports}")
    if manifest.base is not None:
        echo(f"stored as the difference to {name} {manifest.base}, which a reader needs as well")
    echo(rows_table(explain.table(manifest, choices)))
    echo(explain.codec_counts(manifest))
    echo(_blob_table(manifest))
    beside = " beside the base" if manifest.base is not None else ""
    ratio = manifest.raw_bytes / manifest.published_bytes
    published = f"{manifest.published_bytes:,} published{beside}"
    echo(f"{manifest.raw_bytes:,} bytes raw, {published}: compression ratio {ratio:.2f}")


def _parts(store: Store, manifest: Manifest, *, needed: bool) -> Parts | None:
    """What reads the pack; None where no key opens it, unless it is needed."""
    from modelpress import load
    from modelpress.errors import EncryptionKeyError

    try:
        return load.open_parts(store, manifest)
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
