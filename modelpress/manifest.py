"""The manifest of a pack: what it holds, by digest. Its own sha256 is the pack's identity.

Canonical JSON (keys sorted, no spaces, UTF-8): the same content has one spelling and one digest. It holds no time and
no place; those live in the pointer and in the tracker. The layout is part of `container/FORMAT.md`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from importlib import metadata
from math import prod
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    model_serializer,
    model_validator,
)

from modelpress.config import PackName
from modelpress.dtypes import DTYPES, raw_size
from modelpress.errors import ConfigError, CorruptionError, UnsupportedFormatError
from modelpress.strictjson import loads

FORMAT_VERSION: Final = 3
"""The newest version that is read."""
PLAIN_VERSION: Final = 2
"""What a pack is written as that needs nothing of a later version: older releases read it."""
MAX_MANIFEST_BYTES = 256 * 2**20
MAX_RANK = 64
RAW: Final = "raw"
"""Codec of a tensor that is stored as it is."""
NOTHING: Final = hashlib.sha256().hexdigest()
"""Digest of no bytes: what a tensor without pieces has for its coded bytes."""
MAX_EXPANSION = 2**16
"""A tensor that claims more raw bytes for its stored bytes is refused, and `compress` makes none."""

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0, lt=2**63)]
DTypeName = Annotated[str, StringConstraints(pattern=r"^[A-Z0-9_]{1,16}$")]
SecretId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]

TAG_BYTES: Final = 16
"""What encryption adds to each segment."""


class Entry(BaseModel):
    """Base of the manifest's parts: frozen, strict, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    later: ClassVar[frozenset[str]] = frozenset()
    """Fields that came with format version 3: null where they are not used, and then not spelled."""

    @model_serializer(mode="wrap")
    def _spell(self, usual: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = usual(self)
        return {name: value for name, value in fields.items() if value is not None or name not in self.later}


class Plain(Entry):
    """The bytes of a blob as they are without encryption."""

    sha256: Sha256
    """Their digest."""
    size_bytes: Size
    """Their length."""


class Encryption(Entry):
    """How the blobs of a pack are encrypted; see `modelpress.cipher`."""

    algorithm: Literal["AES-256-GCM-STREAM"] = "AES-256-GCM-STREAM"
    """The one there is."""
    secret: SecretId
    """Id of the model's secret, from which each blob's key is derived."""
    segment_bytes: int = Field(default=2**18, ge=1, le=2**24)
    """Bytes of a segment before it is encrypted; the last one may be shorter."""

    def segments(self, plain_bytes: int) -> int:
        """Segments of a blob of so many bytes: at least one."""
        return max(1, -(-plain_bytes // self.segment_bytes))

    def stored_bytes(self, plain_bytes: int) -> int:
        """What so many bytes take when they are encrypted."""
        return plain_bytes + TAG_BYTES * self.segments(plain_bytes)


class ShardEntry(Entry):
    """One shard: a blob that is a valid safetensors file."""

    later = frozenset({"plain"})

    sha256: Sha256
    """Digest of the blob, and its key."""
    size_bytes: Size
    """Its length."""
    plain: Plain | None = None
    """The safetensors file that an encrypted blob holds."""

    @property
    def content(self) -> Plain:
        """The safetensors file, encrypted or not."""
        return self.plain or Plain(sha256=self.sha256, size_bytes=self.size_bytes)


class TensorEntry(Entry):
    """One tensor: where it lies and what it must be."""

    later = frozenset({"base"})

    name: str
    """Its name in the checkpoint."""
    dtype: DTypeName
    """safetensors dtype name."""
    shape: tuple[Size, ...] = Field(max_length=MAX_RANK)
    """Its shape; empty for a scalar."""
    codec: str
    """Codec id; `raw` is uncompressed."""
    raw_sha256: Sha256
    """Digest of the tensor's own bytes, little-endian, row-major."""
    stored_sha256: Sha256
    """Digest of its coded bytes: chunk by chunk, in each chunk stream by stream."""
    stored_bytes: Size
    """Length of its coded bytes."""
    entropy_bound_bytes: Size
    """Order-0 entropy bound of its byte planes, rounded up."""
    shards: Annotated[tuple[Size, ...], FailFast()]
    """Positions in `Manifest.shards` of its pieces, in element order; none where it is the base's tensor as it is."""
    base: str | None = None
    """Name of the base pack's tensor, of the same dtype and shape, that it is stored as the difference to: word by
    word, modulo 2^bits. Without `shards` there is no difference."""

    @property
    def raw_bytes(self) -> int:
        """Length of the tensor's own bytes."""
        return raw_size(self.dtype, self.shape)

    @property
    def is_base(self) -> bool:
        """Whether it is the base's tensor, bit by bit, so that nothing of it is stored."""
        return self.base is not None and not self.shards


class FileEntry(Entry):
    """One file (graph, tokenizer, reports): a blob, perhaps a zstandard frame."""

    later = frozenset({"plain"})

    name: str
    """Relative path in the checkpoint's folder."""
    sha256: Sha256
    """Digest of the file's own bytes."""
    size_bytes: Size
    """Length of the file's own bytes."""
    codec: Literal["raw", "zstd"]
    """`zstd`: the blob is one standard frame."""
    stored_sha256: Sha256
    """Digest of the blob, and its key."""
    stored_bytes: Size
    """Length of the blob."""
    plain: Plain | None = None
    """The file or frame that an encrypted blob holds."""

    @property
    def content(self) -> Plain:
        """The file or frame, encrypted or not."""
        return self.plain or Plain(sha256=self.stored_sha256, size_bytes=self.stored_bytes)


class Manifest(Entry):
    """Everything that a reader needs to fetch, verify, rebuild and explain a published model."""

    later = frozenset({"base", "encryption"})

    format_version: Literal[1, 2, 3] = PLAIN_VERSION
    """Version of the pack format."""
    name: PackName
    """Pack name."""
    kind: Literal["torch", "onnx"]
    """What the tensors are: a state dict, or the initializers of the graph in the file `model.onnx`."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """The checkpoint's own metadata (how to rebuild the module)."""
    shards: Annotated[tuple[ShardEntry, ...], FailFast()]
    """Every shard, in reading order."""
    tensors: Annotated[tuple[TensorEntry, ...], FailFast()]
    """Every tensor, in reading order."""
    files: Annotated[tuple[FileEntry, ...], FailFast()]
    """Every file, by name."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The configuration of the run that made it."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of modelpress and of the libraries that shaped the bytes."""
    lineage: dict[str, Any] = Field(default_factory=dict)
    """Where it comes from: digests of the source and of the stages' outputs, tracker run."""
    licence: str = "unknown"
    """SPDX identifier or text of the source model's licence."""
    reports: FileEntry | None = None
    """The stages' reports, one JSON object by stage."""
    base: Sha256 | None = None
    """Digest of the pack, of the same name, that some tensors are stored as the difference to."""
    encryption: Encryption | None = None
    """How all blobs are encrypted; null where none is."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        entries: list[Entry] = [self, *self.shards, *self.tensors, *self.blob_files()]
        used = sorted({name for entry in entries for name in entry.later if getattr(entry, name) is not None})
        if bool(used) != (self.format_version > PLAIN_VERSION):
            raise ValueError(f"format version {self.format_version} with {', '.join(used) or 'nothing'} of version 3")
        _unique("tensors", [tensor.name for tensor in self.tensors])
        _unique("files", [file.name for file in self.files])
        for tensor in self.tensors:
            self._check_tensor(tensor)
        for file in self.blob_files():
            _check_file(file)
        differences = [tensor.base for tensor in self.tensors if tensor.base is not None]
        if self.base is not None and not differences:
            raise ValueError(f"base {self.base}, and no tensor that is stored as a difference to it")
        _unique("the base's tensors", differences)  # so that no manifest claims more than the base holds
        self._check_encryption()
        reached = {position for tensor in self.tensors for position in tensor.shards}
        if reached != set(range(len(self.shards))):
            raise ValueError(f"tensors use shards {sorted(reached)}, of {len(self.shards)} listed")
        return self

    def _check_tensor(self, tensor: TensorEntry) -> None:
        where = f"tensor {tensor.name!r}"
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{where}: unknown dtype {tensor.dtype!r}")
        if prod(max(size, 1) for size in tensor.shape) * DTYPES[tensor.dtype].itemsize >= 2**63:
            raise ValueError(f"{where}: shape {list(tensor.shape)} is beyond any memory")
        if tensor.base is not None and self.base is None:
            raise ValueError(f"{where}: a difference to {tensor.base!r} of a base, and the manifest names none")
        if tensor.base is not None and (tensor.codec == RAW) != tensor.is_base:
            raise ValueError(f"{where}: a difference stored as {tensor.codec!r} in {len(tensor.shards)} pieces")
        if not tensor.shards:
            if not tensor.is_base or (tensor.stored_bytes, tensor.stored_sha256) != (0, NOTHING):
                raise ValueError(f"{where}: in no shard")
            return
        if list(tensor.shards) != list(range(tensor.shards[0], tensor.shards[0] + len(tensor.shards))):
            raise ValueError(f"{where}: pieces in shards {list(tensor.shards)}, not in neighbouring ones")
        if tensor.shards[-1] >= len(self.shards):
            raise ValueError(f"{where}: shard {tensor.shards[-1]} of {len(self.shards)}")
        room = sum(self.shards[position].size_bytes for position in tensor.shards)
        if tensor.stored_bytes > room:
            raise ValueError(f"{where}: {tensor.stored_bytes} stored bytes in shards of {room} bytes")
        if tensor.raw_bytes > tensor.stored_bytes * MAX_EXPANSION:
            raise ValueError(f"{where}: {tensor.raw_bytes} raw bytes claimed from {tensor.stored_bytes} stored bytes")

    def _check_encryption(self) -> None:
        """All blobs or none, each as long as its segments make it."""
        blobs = [("shard", shard.sha256, shard.size_bytes, shard.plain) for shard in self.shards]
        blobs += [("file", file.stored_sha256, file.stored_bytes, file.plain) for file in self.blob_files()]
        for what, digest, size, plain in blobs:
            if (plain is None) != (self.encryption is None):
                raise ValueError(f"{what} {digest}: encrypted and plain blobs in one pack, or no word on how")
            if plain and self.encryption and size != self.encryption.stored_bytes(plain.size_bytes):
                raise ValueError(f"{what} {digest}: {size} bytes, which are not {plain.size_bytes} bytes encrypted")

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        """sha256 (hex) of `to_bytes`: the pack's identity."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def raw_bytes(self) -> int:
        """Bytes of all tensors and files, uncompressed (without the reports)."""
        return sum(tensor.raw_bytes for tensor in self.tensors) + sum(file.size_bytes for file in self.files)

    @property
    def published_bytes(self) -> int:
        """Bytes of all blobs and of the manifest itself."""
        return sum(self.blobs().values()) + len(self.to_bytes())

    def blobs(self) -> dict[str, int]:
        """Every blob of the pack: sha256 (hex) to length. Equal content is one blob."""
        return {shard.sha256: shard.size_bytes for shard in self.shards} | {
            file.stored_sha256: file.stored_bytes for file in self.blob_files()
        }

    def blob_files(self) -> list[FileEntry]:
        """The files, and the reports behind them: every blob that is no shard."""
        return [*self.files, *([self.reports] if self.reports else [])]

    def file(self, name: str) -> FileEntry:
        """The entry of a file.

        Raises:
            ConfigError: the pack has none of this name.
        """
        for entry in self.files:
            if entry.name == name:
                return entry
        names = ", ".join(entry.name for entry in self.files) or "no files"
        raise ConfigError(f"looking for file {name!r} in pack {self.name}", found=names)

    @classmethod
    def parse(cls, data: bytes, expected_digest: str | None = None) -> Manifest:
        """Read what `to_bytes` wrote.

        Raises:
            CorruptionError: the digest differs, or the bytes are no canonical manifest.
            UnsupportedFormatError: written by a newer format version.
        """
        doing = f"reading manifest {expected_digest or ''}".rstrip()
        found_digest = hashlib.sha256(data).hexdigest()
        if expected_digest is not None and found_digest != expected_digest:
            raise CorruptionError(doing, found=f"sha256 {found_digest}", expected=f"sha256 {expected_digest}")
        if len(data) > MAX_MANIFEST_BYTES:
            raise CorruptionError(doing, found=f"{len(data)} bytes", expected=f"at most {MAX_MANIFEST_BYTES}")
        document = loads(data, doing)
        check_version(document.get("format_version"), doing)
        try:
            manifest = cls.model_validate(document)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "manifest"
            raise CorruptionError(
                doing, found=f"{where}: {first['msg']}", expected="a manifest as in FORMAT.md"
            ) from error
        try:
            spelled = manifest.to_bytes()
        except (ConfigError, ValueError) as error:  # surrogates, or objects nested too deep to be written
            raise CorruptionError(
                doing, found=str(error)[:200], expected="canonical JSON, as FORMAT.md says"
            ) from error
        if spelled != data:
            raise CorruptionError(doing, found="another spelling", expected="canonical JSON, as FORMAT.md says")
        return manifest


def needs(manifest: Manifest) -> tuple[str, ...]:
    """Digests of the other packs, of the same name, without which this one cannot be read: their manifests and all
    their blobs must stay for as long as it does. A base needs no other pack: there are no chains."""
    return (manifest.base,) if manifest.base is not None else ()


def canonical_json(document: Any) -> bytes:
    """JSON with sorted keys, without spaces, in UTF-8; infinities and NaNs are refused.

    Raises:
        ConfigError: something in it is no JSON.
    """
    try:
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode()
    except (TypeError, ValueError) as error:
        raise ConfigError("writing canonical JSON", found=str(error), expected="finite JSON values") from error


def check_version(version: object, doing: str, newest: int = FORMAT_VERSION) -> None:
    """Refuse a format version above `newest`.

    Raises:
        UnsupportedFormatError: a newer one.
        CorruptionError: no version at all.
    """
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CorruptionError(doing, found=f"format version {version!r}", expected=f"a number up to {newest}")
    if version > newest:
        raise UnsupportedFormatError(
            doing, found=f"format version {version}", expected=f"at most {newest}", fix="update modelpress"
        )


def library_versions() -> dict[str, str]:
    """Versions of what shapes a pack's bytes."""
    packages = ("modelpress", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "safetensors", "torch", "zstandard")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _unique(what: str, names: list[str]) -> None:
    if len(set(names)) != len(names):
        twice, times = Counter(names).most_common(1)[0]
        raise ValueError(f"{what}: {twice!r} stands {times} times")


def _check_file(file: FileEntry) -> None:
    """A name that stays inside the folder it is written to, on every system."""
    parts = file.name.split("/")
    if (
        not all(parts)
        or any(part in (".", "..") for part in parts)
        or any(c < " " or c in "\\:\x7f" for c in file.name)
    ):
        raise ValueError(f"file {file.name!r}: not a relative path of plain names")
    if file.codec == "raw" and (file.sha256, file.size_bytes) != (file.content.sha256, file.content.size_bytes):
        raise ValueError(f"file {file.name!r}: stored raw, yet its two digests or lengths differ")
