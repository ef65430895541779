"""The codecs without a transform: `raw` and `zstd`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import zstandard

from modelpress.codec.base import Bytes, Codec, Stream
from modelpress.codec.coders import count_planes, cut, decompress, zstd_stream
from modelpress.codec.entropy import entropy_bits
from modelpress.config import CompressConfig
from modelpress.dtypes import DType

PROBE_BYTES = 2**16
PROBES = 8
PROBE_LEVEL = 5


class Raw(Codec):
    """The tensor's bytes as they are, in one chunk."""

    codec_id = "raw"
    coders = ("raw",)
    decode_bytes_per_second = float("inf")

    def suits(self, raw: Bytes, dtype: DType) -> bool:  # noqa: ARG002
        """Always."""
        return True

    def layout(self, dtype: DType) -> dict[str, int | None]:
        """The elements."""
        return {"raw": dtype.itemsize}

    def encode(self, raw: Bytes, dtype: DType, config: CompressConfig) -> list[Stream]:  # noqa: ARG002
        """See `Codec.encode`; nothing is copied."""
        return [Stream.of("raw", "raw", [raw.data] if raw.size else [])]

    def decode_into(
        self,
        streams: Sequence[Stream],
        dtype: DType,  # noqa: ARG002
        symbols: int,  # noqa: ARG002
        chunk_symbols: int,  # noqa: ARG002
        out: Bytes,
    ) -> None:
        """See `Codec.decode_into`."""
        out[:] = np.frombuffer(streams[0].body, np.uint8)


class Zstd(Codec):
    """The tensor's bytes through zstandard, matches and all: wins where content repeats."""

    codec_id = "zstd"
    coders = ("zstd",)
    decode_bytes_per_second = 0.5e9

    def suits(self, raw: Bytes, dtype: DType) -> bool:
        """Whether a few probes get smaller than their order-0 bound: then something repeats.

        A search for matches is slow, and finds none in most weights.
        """
        step = max(PROBE_BYTES, raw.size // PROBES // dtype.itemsize * dtype.itemsize)
        probe = np.concatenate([raw[start : start + PROBE_BYTES] for start in range(0, raw.size, step)] or [raw])
        bound = sum(entropy_bits(plane) for plane in count_planes(probe, dtype)) / 8
        return len(zstandard.ZstdCompressor(level=PROBE_LEVEL).compress(probe.data)) < bound + 32

    def layout(self, dtype: DType) -> dict[str, int | None]:
        """The elements."""
        return {"data": dtype.itemsize}

    def encode(self, raw: Bytes, dtype: DType, config: CompressConfig) -> list[Stream]:
        """See `Codec.encode`."""
        return [zstd_stream("data", cut(raw, config.chunk_symbols * dtype.itemsize), config.zstd_level)]

    def decode_into(
        self, streams: Sequence[Stream], dtype: DType, symbols: int, chunk_symbols: int, out: Bytes
    ) -> None:
        """See `Codec.decode_into`."""
        size = chunk_symbols * dtype.itemsize
        for chunk, frame in enumerate(streams[0].each_chunk()):
            target = out[chunk * size : min((chunk + 1) * size, symbols * dtype.itemsize)]
            target[:] = np.frombuffer(decompress(frame, target.size, chunk), np.uint8)
