"""The configs of coding, sharding and sending."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from modelpress.config.base import Bytes, Config, refuse_unread


class CompressConfig(Config):
    """Lossless coding of tensors, each by whichever codec is smallest."""

    codecs: list[Literal["zstd", "planes-huffman", "rle-huffman", "mask-huffman"]] = Field(
        default=["zstd", "planes-huffman", "rle-huffman", "mask-huffman"], min_length=1
    )
    """Codecs that are tried; `raw` always is."""
    zstd_level: int = Field(default=9, ge=1, le=22)
    """Level of the `zstd` codec."""
    min_decode_bytes_per_second: float = Field(default=200e6, ge=0)
    """Decode-speed floor, in raw bytes per second on one core; a codec known to be slower is not chosen. 0: none."""
    chunk_symbols: int = Field(default=131_072, ge=4_096, le=16_777_216)
    """Symbols (elements) per independently decodable chunk."""
    base: str | None = None
    """Alias or digest of a published pack of the same name: tensors are stored as the difference to its, where that is
    smaller, and equal ones not at all. Needs its codes on the same scales, see `quantize.scales_from`. Of a pack that
    is stored so itself, its base is taken."""
    max_delta_share: float = Field(default=0.5, gt=0, le=1)
    """With `base`: a whole pack is published all the same where differences would take more than this share of it."""

    @model_validator(mode="after")
    def _check(self) -> CompressConfig:
        if self.base is None:
            refuse_unread(self, "compress", {"max_delta_share": "compress.base"})
        return self


class ShardConfig(Config):
    """How the coded tensors are cut into objects."""

    by: Literal["size", "layer", "rank"] = "size"
    """`size` fills shards in tensor order; `layer` also starts a new shard at each layer; `rank` at the shares of each
    tensor-parallel rank, of a checkpoint that was cut for them (no graph is)."""
    max_shard_size: Bytes = 64 * 2**20
    """Bytes; no shard is larger. A single tensor that is larger is split over several."""


class UploadConfig(Config):
    """How shards travel to the store."""

    concurrency: int = Field(default=4, ge=1, le=64)
    """Objects in flight."""
    encrypt: bool = False
    """Encrypt every shard, file and report with the model's secret, which a key of the settings opens. The manifest
    stays readable."""
    golden_samples: int = Field(default=4, ge=0, le=64)
    """Inputs that are published with the graph's answers to them: a server asks the same before it lets a pack answer.
    0: none."""
    golden_inputs: Literal["synthetic", "calibration"] = "synthetic"
    """`synthetic`: noise of the calibration data's types, shapes and ranges. `calibration`: samples of that data, which
    can be read by who reads the pack."""

    @model_validator(mode="after")
    def _check(self) -> UploadConfig:
        if not self.golden_samples:
            refuse_unread(self, "upload", {"golden_inputs": "upload.golden_samples"})
        return self
