"""A pack's base: the pack, whole in itself, that some of its tensors are stored as the difference to."""

from __future__ import annotations

from collections.abc import Callable

from modelpress.codec import Bytes
from modelpress.container.read import decode_tensor, read_shard
from modelpress.container.stored import Piece
from modelpress.container.tensors import to_bytes
from modelpress.cores import usable_cores
from modelpress.errors import CorruptionError, FormatError, NotFoundError
from modelpress.manifest import Manifest, TensorEntry


class PackTensors:
    """Reads a pack's tensors by name, in any order.

    One shard is held at a time: in the pack's order each is read once. Not for several threads.

    Args:
        manifest: of a pack that stands alone.
        fetch: gives the bytes of the shard with a sha256.
    """

    def __init__(self, manifest: Manifest, fetch: Callable[[str], bytes]) -> None:
        self.manifest, self._fetch = manifest, fetch
        self.entries = {tensor.name: tensor for tensor in manifest.tensors}
        """The manifest's, by name."""
        self._held: tuple[int, list[Piece]] | None = None

    def read(self, name: str) -> Bytes:
        """The tensor's bytes, (raw bytes,) uint8, verified, in memory of their own.

        Raises:
            NotFoundError: a shard is not there.
            CorruptionError: a shard or the tensor is not what the manifest says.
        """
        entry = self.entries[name]
        pieces = (piece for position in entry.shards for piece in self._pieces(position, name))
        return to_bytes(decode_tensor(entry, pieces, threads=usable_cores()))

    def _pieces(self, position: int, name: str) -> list[Piece]:
        if self._held is None or self._held[0] != position:
            self._held = None  # the next shard is fetched when this one is let go
            self._held = position, read_shard(self.manifest, position, self._fetch)
        return [piece for piece in self._held[1] if piece.name == name]


class Base:
    """Gives a pack its base's tensors as it asks for them; of the base's shards only those that hold them are read.

    Args:
        pack: stored as differences.
        manifest: its base's.
        fetch: gives the bytes of the base's shard with a sha256.

    Raises:
        CorruptionError: this is not what the pack can be read with; see `check_base`.
    """

    def __init__(self, pack: Manifest, manifest: Manifest, fetch: Callable[[str], bytes]) -> None:
        check_base(pack, manifest)
        self.manifest = manifest
        self._doing = f"reading {manifest.name}@{manifest.digest}, the base of {pack.name}@{pack.digest}"
        self._tensors = PackTensors(manifest, fetch)
        used = [self._tensors.entries[tensor.base] for tensor in pack.tensors if tensor.base is not None]
        positions = sorted({position for tensor in used for position in tensor.shards})
        self.blobs = {manifest.shards[position].sha256: manifest.shards[position].size_bytes for position in positions}
        """The base's shards that are read: sha256 (hex) to length."""

    @property
    def read_bytes(self) -> int:
        """Bytes of those shards and of the base's manifest."""
        return sum(self.blobs.values()) + len(self.manifest.to_bytes())

    def __call__(self, entry: TensorEntry) -> Bytes:
        """The base's tensor behind an entry of the pack: (raw bytes,) uint8, verified, in memory of its own.

        Raises:
            NotFoundError: a shard of the base is not there.
            CorruptionError: a shard or the tensor is not what the base's manifest says. Both packs are named.
        """
        try:
            return self._tensors.read(entry.base or "")
        except (NotFoundError, FormatError) as error:
            base = self.manifest
            raise type(error)(
                f"{self._doing}, for tensor {entry.name!r}: {error.doing}",
                found=error.found,
                expected=error.expected,
                fix=error.fix or f"publish {base.name}@{base.digest} again",
            ) from error


def check_base(pack: Manifest, base: Manifest) -> None:
    """Refuse a base that the pack cannot be read with, before any of its shards is read.

    Raises:
        CorruptionError: another pack, one of another name, one that is stored as differences itself (there are no
            chains), or one without a tensor of the name, dtype and shape (or, where nothing is stored, the digest) that
            the pack refers to.
    """
    doing = f"reading the base {base.name}@{base.digest} of pack {pack.name}@{pack.digest}"
    if (base.name, base.digest) != (pack.name, pack.base):
        raise CorruptionError(doing, found="another pack", expected=f"{pack.name}@{pack.base}")
    if base.base is not None:
        raise CorruptionError(doing, found=f"differences to {base.base}", expected="a base that stands alone")
    entries = {tensor.name: tensor for tensor in base.tensors}
    for tensor in pack.tensors:
        if tensor.base is None:
            continue
        entry = entries.get(tensor.base)
        found = "no such tensor" if entry is None else f"{entry.dtype} {list(entry.shape)}"
        expected = f"{tensor.dtype} {list(tensor.shape)}"
        if entry is not None and tensor.is_base:
            found, expected = f"{found}, sha256 {entry.raw_sha256}", f"{expected}, sha256 {tensor.raw_sha256}"
        if found != expected:
            raise CorruptionError(f"{doing}, tensor {tensor.base!r}", found=found, expected=expected)
