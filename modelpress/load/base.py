"""What a pack needs beside its own blobs: the manifest of its base, and one count of the bytes of both."""

from __future__ import annotations

from modelpress import keys
from modelpress.errors import FormatError, NotFoundError
from modelpress.load.names import load_manifest
from modelpress.manifest import Manifest
from modelpress.progress import Progress
from modelpress.store.base import Store


def load_base(store: Store, manifest: Manifest, digest: str) -> Manifest:
    """Read and verify the manifest of a pack's base.

    Raises:
        NotFoundError: it is not there; both packs are named.
        CorruptionError: its bytes do not have this digest, or name another pack.
        UnsupportedFormatError: written by a newer modelpress.
    """
    try:
        return load_manifest(store, manifest.name, digest)
    except (NotFoundError, FormatError) as error:
        gone = isinstance(error, NotFoundError)
        raise type(error)(
            f"reading {manifest.name}@{digest}, the base of {manifest.name}@{manifest.digest}",
            found=f"no manifest {store.uri}/{keys.manifest(manifest.name, digest)}" if gone else error.found,
            expected=error.expected or "the pack that its tensors are stored as the difference to",
            fix=error.fix or "publish or copy the base again; a copy of a pack to another store needs its base as well",
        ) from error


class Joint:
    """Bytes that have been read of several packs, as one count."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._done, self.total_bytes = progress, list[int](), 0

    def part(self) -> Progress:
        """What counts one of them."""
        place = len(self._done)
        self._done.append(0)

        def counted(done: int, total: int, note: str = "") -> None:  # noqa: ARG001
            self._done[place] = done
            self._progress(sum(self._done), self.total_bytes, note)

        return counted
