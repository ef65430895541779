"""Publishing is a commit: blobs first, in parallel and each once; the manifest last, and only if absent.

With a key to sign with, the signature is put before the manifest that it signs: no reader meets a manifest that still
waits for it.

A run that was killed at any moment is run again: blobs that are there are not sent again, an interrupted multipart
upload continues, and the pack gets the same digest. Until the manifest stands, nothing refers to the blobs, so nobody
ever sees half a pack. What the pack needs is announced before anything is looked for, so that no collection takes what
was found (`modelpress.housekeeping`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from pathlib import Path
from typing import TYPE_CHECKING

from modelpress import keys
from modelpress.config import UploadConfig
from modelpress.errors import StageError
from modelpress.housekeeping.intents import announced
from modelpress.manifest import Manifest
from modelpress.progress import Progress, silent
from modelpress.reports import UploadReport
from modelpress.store.base import Store, put_once
from modelpress.store.threads import DaemonPool
from modelpress.trust import sign_pack
from modelpress.trust.packs import check_signer

if TYPE_CHECKING:
    from modelpress.shard import ShardFile


def publish(
    store: Store,
    manifest: Manifest,
    shards: Sequence[ShardFile],
    blobs: Mapping[str, bytes],
    *,
    config: UploadConfig | None = None,
    source_bytes: int,
    progress: Progress = silent,
) -> UploadReport:
    """Send what the store lacks of a pack, then commit its manifest.

    Memory beside what is given, on S3: 1 MiB for each of the `config.concurrency` objects that travel at once, and for
    those above 64 MiB, which travel in parts, five parts of 16 MiB between them.

    Args:
        store: the publication store; it is proved fit first, once.
        manifest: the pack.
        shards: the files of the manifest's shards.
        blobs: the stored bytes of the manifest's files and reports, by sha256 (what `pack_files.pack_file` gave).
        config: how many objects travel at once.
        source_bytes: bytes of the source model's checkpoint, for the ratio.
        progress: called with bytes that are in the store, and the pack's bytes.

    Raises:
        StageError: a blob of the manifest is not among `shards` and `blobs`.
        NotFoundError: the pack's base is not published here; CorruptionError: the pack cannot be read with it.
        CorruptionError: bytes on the way do not have the digest that the manifest says.
        ConflictError: another manifest, or another signature, stands under this digest.
        KeyRefusedError: the store has a trust file, in which the key to sign with does not count for this name.
        StoreError: see `modelpress.store.Store`.
    """
    started = time.perf_counter()
    if store.trust is not None and store.signer is not None:
        policy = store.trust.policy()
        check_signer(policy, store.signer, manifest.name, policy.required, f"publishing {manifest.name}")
    sizes = manifest.blobs()
    sources = _sources(manifest, shards, blobs)
    store.ensure_fit()
    _base_bytes(store, manifest)  # before anything is sent
    upload = _Upload(store, sum(sizes.values()), progress)
    # Large ones first: the last thread is not left alone with the largest.
    order = sorted(sizes, key=lambda digest: (-sizes[digest], digest))
    blobs_in_order = [(digest, sizes[digest], sources[digest]) for digest in order]
    with announced(
        store,
        manifest.name,
        manifest.digest,
        base=manifest.base,
        blobs=sizes,
        resumable=True,
        progress=lambda _done, _total, note="": progress(upload.done_bytes, upload.total_bytes, note),
    ) as announcement:
        _send_all(upload, blobs_in_order, config or UploadConfig())
        while not announcement.holds():  # it lay asleep for days: what was there may have been collected
            announcement.announce()
            upload.begin_anew()
            _send_all(upload, blobs_in_order, config or UploadConfig())
        base_bytes = _base_bytes(store, manifest)  # again: now our intent keeps it
        if store.signer is not None:
            sign_pack(store, store.signer, manifest.name, manifest.digest)
        _commit(store, manifest)
    published = manifest.published_bytes
    return UploadReport(
        pack=manifest.digest,
        uri=f"{store.uri}/{keys.manifest(manifest.name, manifest.digest)}",
        objects=len(sizes),
        sent_objects=upload.sent_objects,
        sent_bytes=upload.sent_bytes,
        published_bytes=published,
        source_bytes=source_bytes,
        base_bytes=base_bytes,
        compression_ratio=source_bytes / (published + base_bytes),
        seconds=time.perf_counter() - started,
    )


def _send_all(upload: _Upload, blobs: Sequence[tuple[str, int, bytes | Path]], config: UploadConfig) -> None:
    """Send blobs in parallel; after the first error nothing new is begun, and what is on its way is awaited."""
    pool = DaemonPool(config.concurrency, "publish")
    awaits = False
    try:
        futures = [pool.submit(upload.send, *blob) for blob in blobs]
        wait(futures, return_when=FIRST_EXCEPTION)
        awaits = True
    finally:  # an interrupt awaits nothing: what is cut off is sent by the next run
        pool.shutdown(wait=awaits, cancel_futures=True)
    for future in futures:
        if not future.cancelled():
            future.result()


class _Upload:
    """The blobs of one pack on their way, counted; `send` is called from threads."""

    def __init__(self, store: Store, total_bytes: int, progress: Progress) -> None:
        self.sent_objects = self.sent_bytes = self.done_bytes = 0
        self.total_bytes = total_bytes
        self._store, self._progress = store, progress
        self._lock = threading.Lock()

    def begin_anew(self) -> None:
        """Count what is there from nothing; what was sent was sent."""
        self.done_bytes = 0

    def send(self, digest: str, size: int, source: bytes | Path) -> None:
        key = keys.blob(digest)
        info = self._store.info(key)
        missing = info is None or info.size_bytes != size
        if missing:
            self._store.put(key, source, sha256=digest)
        with self._lock:
            self.sent_objects += missing
            self.sent_bytes += size if missing else 0
            self.done_bytes += size
            self._progress(self.done_bytes, self.total_bytes, f"{'sent' if missing else 'present'} {digest[:12]}")


def _sources(manifest: Manifest, shards: Sequence[ShardFile], blobs: Mapping[str, bytes]) -> dict[str, bytes | Path]:
    given: dict[str, bytes | Path] = {**blobs, **{shard.sha256: shard.path for shard in shards}}
    missing = [digest for digest in manifest.blobs() if digest not in given]
    if missing:
        raise StageError(
            f"publishing {manifest.name}",
            found=f"no bytes for {len(missing)} of {len(manifest.blobs())} blobs, first {missing[0]}",
            expected="every shard, file and report that the manifest lists",
        )
    return given


def _base_bytes(store: Store, manifest: Manifest) -> int:
    """What a reader needs beside the pack; a pack without its base is never published."""
    if manifest.base is None:
        return 0
    from modelpress.load import open_parts  # torch and onnx, which a pack that stands alone has no need of

    base = open_parts(store, manifest).base
    return base.read_bytes if base is not None else 0


def _commit(store: Store, manifest: Manifest) -> None:
    """Write the manifest. One that is there already is our own, from a lost answer or an earlier run, if it holds
    the same bytes."""
    key, data = keys.manifest(manifest.name, manifest.digest), manifest.to_bytes()
    doing, expected = f"publishing {manifest.name}", "the manifest that the digest names"
    put_once(store, key, data, doing, expected=expected, again="publish")
