"""From a manifest to tensors and files: every byte is read and checked."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from torch import Tensor

from modelpress import keys
from modelpress.cache import BlobCache
from modelpress.checkpoint import Checkpoint
from modelpress.container import Base, read_tensors
from modelpress.load.base import Joint, load_base
from modelpress.load.blobs import Blobs
from modelpress.load.names import check_trust, load_manifest, resolve
from modelpress.load.stream import stream_tensors
from modelpress.manifest import Manifest
from modelpress.pack_files import read_files, read_reports
from modelpress.parallel.slices import whole
from modelpress.progress import Progress, silent
from modelpress.reports import VerifyReport
from modelpress.store.base import Store


def load_checkpoint(
    store: Store, name: str, digest: str, progress: Progress = silent, *, cache: BlobCache | None = None
) -> tuple[Manifest, Checkpoint]:
    """Read a pack while its bytes come, with everything verified (see `stream_tensors`); `progress` counts bytes.

    With a `cache`, blobs that are there are read from there, and the others are kept there. Tensors that are stored as
    the shares of tensor-parallel ranks come whole.

    Raises:
        NotFoundError: the pack, or one of its blobs, is not there.
        CorruptionError: any digest or length differs; the message names the shard, the tensor or the file.
        EncryptionKeyError: the pack is encrypted, and none of the keys that the settings name opens it.
        UnsupportedFormatError: written by a newer modelpress.
    """
    manifest = load_manifest(store, name, digest)
    parts = open_parts(store, manifest, progress, cache)
    with contextlib.closing(parts.stream()) as stream:
        tensors = dict(stream)
    found = Checkpoint(manifest.kind, tensors, read_files(manifest, parts.fetch), dict(manifest.metadata))
    return manifest, whole(found)


def verify(store: Store, name: str, ref: str, progress: Progress = silent) -> VerifyReport:
    """Read everything of a pack afresh from the store and check every digest, one shard at a time, keeping nothing.

    Raises:
        see `resolve` and `load_checkpoint`.
    """
    started = time.perf_counter()
    digest = resolve(store, name, ref)
    manifest = load_manifest(store, name, digest)
    parts = open_parts(store, manifest, progress)
    base, tensors = parts.base, sum(1 for _ in parts.tensors())
    files = len(read_files(manifest, parts.fetch))
    read_reports(manifest, parts.fetch)
    return VerifyReport(
        pack=digest,
        uri=f"{store.uri}/{keys.manifest(name, digest)}",
        shards=len(manifest.shards) + (len(base.blobs) if base else 0),
        tensors=tensors,
        files=files,
        read_bytes=manifest.published_bytes + (base.read_bytes if base else 0),
        signed_by=tuple(one.line() for one in check_trust(store, name, digest)) if store.trust else None,
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True)
class Parts:
    """What a pack is read with."""

    manifest: Manifest
    blobs: Blobs
    base: Base | None
    """Gives the tensors of the pack that this one is the difference to; None where it stands alone."""
    base_blobs: Blobs | None = None
    """The base's."""

    def fetch(self, digest: str) -> bytes:
        """A whole blob; see `Blobs.fetch`."""
        return self.blobs.fetch(digest)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, one shard at a time; see `container.read_tensors`."""
        return read_tensors(self.manifest, self.fetch, original=self.base)

    def stream(self) -> Generator[tuple[str, Tensor], None, None]:
        """Every tensor, while its bytes come; see `stream_tensors`."""
        if self.base is None or self.base_blobs is None:
            return stream_tensors(self.manifest, self.blobs, original=self.base)
        stopped = threading.Event()
        base = Base(self.manifest, self.base.manifest, functools.partial(self.base_blobs.fetch, stopped=stopped))
        return stream_tensors(self.manifest, self.blobs, original=base, stopped=stopped)


def open_parts(store: Store, manifest: Manifest, progress: Progress = silent, cache: BlobCache | None = None) -> Parts:
    """What reads a pack's blobs, and its base's tensors where it has one; both count into one `progress`.

    The base's manifest is read and checked here, before any blob is.

    Raises:
        NotFoundError: the base is not there; both packs are named.
        CorruptionError: the base is not what its digest says, or not what the pack can be read with.
        UnsupportedFormatError: the base was written by a newer modelpress.
    """
    if manifest.base is None:
        return Parts(manifest, Blobs(store, manifest, progress, cache), None)
    found, joint = load_base(store, manifest, manifest.base), Joint(progress)
    base_blobs = Blobs(store, found, joint.part(), cache)
    base = Base(manifest, found, base_blobs.fetch)
    joint.total_bytes = sum(manifest.blobs().values()) + sum(base.blobs.values())
    return Parts(manifest, Blobs(store, manifest, joint.part(), cache), base, base_blobs)


def fetcher(store: Store, manifest: Manifest, progress: Progress = silent) -> Callable[[str], bytes]:
    """Read a blob of the pack by its sha256, never more bytes than the manifest says; errors name the pack's part.

    The blobs of an encrypted pack are verified and opened with the keys that the settings name.

    Raises:
        EncryptionKeyError: none of the keys opens the pack; see `cipher.opener`.
    """
    return Blobs(store, manifest, progress).fetch
