"""Commands on this machine's cache of blobs: `cache show`, `cache prune`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from modelpress.cli.common import JsonOption, app, echo, rows_table

if TYPE_CHECKING:
    from modelpress.cache import BlobCache

caches = typer.Typer(help="The local cache of verified blobs (MODELPRESS_CACHE).", no_args_is_help=True)
app.add_typer(caches, name="cache")


@caches.command()
def show(as_json: JsonOption = False) -> None:
    """List what is kept, the longest unused first."""
    import json

    cache = _opened()
    kept = cache.blobs()
    if as_json:
        blobs = [{"sha256": blob.digest, "size_bytes": blob.size_bytes, "used_at": blob.used_at} for blob in kept]
        typer.echo(json.dumps({"folder": str(cache.folder), "max_bytes": cache.max_bytes, "blobs": blobs}, indent=2))
        return
    rows = [
        {
            "blob": blob.digest,
            "bytes": f"{blob.size_bytes:,}",
            "last used": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(blob.used_at)),
        }
        for blob in kept
    ]
    echo(rows_table(rows or [{"blob": "none"}]))
    echo(f"{sum(blob.size_bytes for blob in kept):,} of {cache.max_bytes:,} bytes in {cache.folder}")


@caches.command()
def prune(
    to_bytes: Annotated[int, typer.Option("--to-bytes", min=0, help="Keep at most so many bytes.")] = 0,
) -> None:
    """Drop what is longest unused, and what writers that died left behind."""
    from modelpress.store.local import local_errors

    cache = _opened()
    with local_errors(f"pruning the cache {cache.folder}"):
        echo(f"{cache.prune(to_bytes):,} bytes freed in {cache.folder}")


def _opened() -> BlobCache:
    from modelpress.cache import open_cache
    from modelpress.errors import ConfigError

    cache = open_cache()
    if cache is None:
        raise ConfigError("opening the cache", found="no folder", fix="set MODELPRESS_CACHE to one")
    return cache
