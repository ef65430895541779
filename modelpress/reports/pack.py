"""Reports of coding, sharding, sending and verifying."""

from __future__ import annotations

from pydantic import Field

from modelpress.reports.base import Report


class CodedTensor(Report):
    """How one tensor is stored."""

    name: str
    """Tensor name."""
    dtype: str
    """safetensors dtype name."""
    shape: list[int]
    """Shape."""
    codec: str
    """Codec that won."""
    raw_bytes: int
    """Bytes before."""
    stored_bytes: int
    """Bytes after."""
    entropy_bound_bytes: float
    """Order-0 entropy bound of the planes, in bytes."""
    decode_seconds: float | None = None
    """CPU time of decoding, measured when the result was proved; None: stored raw. It stays out of the manifest."""
    candidates: dict[str, int] = Field(default_factory=dict)
    """Bytes in a shard, the description's among them, by codec that was tried, and of `raw`."""
    too_slow: list[str] = Field(default_factory=list)
    """Codecs left out because they decode more slowly than `min_decode_bytes_per_second`."""
    not_tried: list[str] = Field(default_factory=list)
    """Codecs left out at a look: too few zeros, nothing that repeats."""
    base: str | None = None
    """Name of the base's tensor that it is stored as the difference to, or that it equals and takes no bytes."""
    differences: dict[str, int] = Field(default_factory=dict)
    """As the difference to the base's tensor: bytes in a shard by codec; empty where there is none or it is equal."""


class DeltaReport(Report):
    """Whether a pack is stored as the difference to another, and what that takes."""

    base: str
    """Digest of the other pack."""
    chosen: bool
    """Whether it is; else it stands alone."""
    reason: str
    """Why."""
    full_bytes: int
    """Of the tensors in shards, were each stored whole."""
    delta_bytes: int
    """Of the tensors in shards, with differences where those are smaller and nothing where the base's is equal."""
    share: float
    """delta ÷ full."""
    equal: int
    """Tensors that the base has as they are."""
    differences: int
    """Tensors whose difference is smaller than they are."""
    whole: int
    """Tensors that take fewer bytes by themselves, or that the base has not."""


class CompressReport(Report):
    """What lossless coding reached."""

    raw_bytes: int
    """All tensors before."""
    stored_bytes: int
    """All tensors after."""
    compression_ratio: float
    """raw ÷ stored."""
    coded_share: float
    """Share of the raw bytes that a codec other than `raw` won."""
    tensors: list[CodedTensor]
    """Per tensor."""
    delta: DeltaReport | None = None
    """With a base: what became of it."""


class ShardReport(Report):
    """What sharding made."""

    shards: int
    """Number of shards."""
    total_bytes: int
    """Bytes of all shards."""
    largest_bytes: int
    """The largest shard."""


class UploadReport(Report):
    """What publishing sent."""

    pack: str
    """Digest of the manifest: the pack's identity."""
    uri: str
    """Where the manifest lies."""
    objects: int
    """Blobs of the pack."""
    sent_objects: int
    """Blobs that were not there already."""
    sent_bytes: int
    """Bytes sent."""
    published_bytes: int
    """All bytes of the pack: shards, files and manifest."""
    source_bytes: int
    """The source model's checkpoint."""
    base_bytes: int = 0
    """What a reader needs beside: the base's manifest and those of its shards that tensors are the difference to."""
    compression_ratio: float
    """source ÷ (published + base): what a server without any of it must fetch."""
    seconds: float
    """Wall time."""


class VerifyReport(Report):
    """What a verification read and found in order."""

    pack: str
    """Digest of the manifest."""
    uri: str
    """Where the manifest lies."""
    shards: int
    """Shards read."""
    tensors: int
    """Tensors decoded, each equal to its digest."""
    files: int
    """Files read, each equal to its digest."""
    read_bytes: int
    """Bytes of all blobs and of the manifest."""
    signed_by: tuple[str, ...] | None
    """Whose signatures vouch for it; None where there is no trust file, and none were asked for."""
    seconds: float
    """Wall time."""
