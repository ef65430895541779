"""From a manifest to tensors and files: every byte is read and checked."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from modelpress import keys
from modelpress.cache import BlobCache
from modelpress.checkpoint import Checkpoint
from modelpress.container import read_tensors
from modelpress.load.blobs import Blobs
from modelpress.load.names import check_trust, load_manifest, resolve
from modelpress.load.stream import stream_tensors
from modelpress.manifest import Manifest
from modelpress.pack_files import read_files, read_reports
from modelpress.progress import Progress, silent
from modelpress.reports import VerifyReport
from modelpress.store.base import Store


def load_checkpoint(
    store: Store, name: str, digest: str, progress: Progress = silent, *, cache: BlobCache | None = None
) -> tuple[Manifest, Checkpoint]:
    """Read a pack while its bytes come, with everything verified (see `stream_tensors`); `progress` counts bytes.

    With a `cache`, blobs that are there are read from there, and the others are kept there.

    Raises:
        NotFoundError: the pack, or one of its blobs, is not there.
        CorruptionError: any digest or length differs; the message names the shard, the tensor or the file.
        UnsupportedFormatError: written by a newer modelpress.
    """
    manifest = load_manifest(store, name, digest)
    blobs = Blobs(store, manifest, progress, cache)
    with contextlib.closing(stream_tensors(manifest, blobs)) as stream:
        tensors = dict(stream)
    return manifest, Checkpoint(manifest.kind, tensors, read_files(manifest, blobs.fetch), dict(manifest.metadata))


def verify(store: Store, name: str, ref: str, progress: Progress = silent) -> VerifyReport:
    """Read everything of a pack afresh from the store and check every digest, one shard at a time, keeping nothing.

    Raises:
        see `resolve` and `load_checkpoint`.
    """
    started = time.perf_counter()
    digest = resolve(store, name, ref)
    manifest = load_manifest(store, name, digest)
    fetch = fetcher(store, manifest, progress)
    tensors = sum(1 for _ in read_tensors(manifest, fetch))
    files = len(read_files(manifest, fetch))
    read_reports(manifest, fetch)
    return VerifyReport(
        pack=digest,
        uri=f"{store.uri}/{keys.manifest(name, digest)}",
        shards=len(manifest.shards),
        tensors=tensors,
        files=files,
        read_bytes=manifest.published_bytes,
        signed_by=tuple(one.line() for one in check_trust(store, name, digest)) if store.trust else None,
        seconds=time.perf_counter() - started,
    )


def fetcher(store: Store, manifest: Manifest, progress: Progress = silent) -> Callable[[str], bytes]:
    """Read a blob of the pack by its sha256, never more bytes than the manifest says; errors name the pack's part."""
    return Blobs(store, manifest, progress).fetch
