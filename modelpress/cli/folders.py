"""The command that publishes a Hugging Face folder as it is: `publish`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from modelpress.cli.common import Bar, JsonOption, StoreOption, app, echo, store_settings


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="A Hugging Face folder: safetensors, config, tokenizer.")],
    name: Annotated[str, typer.Option("--name", help="Pack name.")],
    alias: Annotated[
        str | None, typer.Option("--alias", help="Point this alias at it; no gate judges it. Default: none.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", help="Leave out what fits, such as '.*'; may be repeated.")
    ] = None,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Take files outside that links lead to, as in a hub's cache.")
    ] = False,
    max_shard_size: Annotated[int | None, typer.Option(min=1, help="Bytes; no shard of the pack is larger.")] = None,
    by: Annotated[
        Literal["size", "layer"], typer.Option("--by", help="layer: no shard holds two layers, for loading parts.")
    ] = "size",
    concurrency: Annotated[int | None, typer.Option(min=1, max=64, help="Objects in flight.")] = None,
    encrypt: Annotated[
        bool, typer.Option("--encrypt", help="Encrypt all but the manifest, with a key of the settings.")
    ] = False,
    licence: Annotated[str | None, typer.Option(help="Its identifier. Default: the model card's.")] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish a folder losslessly, to be pulled byte for byte: of transformers, `quantize` or `blockwise`."""
    from modelpress import keys
    from modelpress.config import ShardConfig, UploadConfig
    from modelpress.store import open_store

    if alias is not None:
        keys.pointers(name, alias)  # before hours are spent
    settings = store_settings(store)
    shard = ShardConfig(by=by, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
    upload = UploadConfig(encrypt=encrypt, **({"concurrency": concurrency} if concurrency else {}))
    opened = open_store(settings.store_uri, settings)
    with Bar("publish") as progress:
        from modelpress.folder import publish_folder

        report = publish_folder(
            *(opened, folder, name),
            work=settings.home.absolute() / "publish",
            shard=shard,
            upload=upload,
            ignore=ignore or [],
            follow_links=follow_links,
            licence=licence,
            progress=progress,
        )
    if alias is not None:
        from modelpress import pointer

        pointer.append(opened, name, alias, report.pack, "publish")
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    echo(f"{name} {report.pack}\n{report.source_bytes:,} → {report.published_bytes:,} bytes, {report.uri}")
    if alias is not None:
        echo(f"{name}@{alias} is this pack now")
