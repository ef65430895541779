"""The codecs without a transform: `raw` and `zstd`."""

from __future__ import annotations

from collections.abc import Sequence

from modelpress.codec.base import Bytes, Codec, Stream
from modelpress.codec.coders import cut, zstd_stream
from modelpress.config import CompressConfig
from modelpress.dtypes import DType


class Raw(Codec):
    """The tensor's bytes as they are, in one chunk."""

    codec_id = "raw"

    def suits(self, raw: Bytes, dtype: DType) -> bool:  # noqa: ARG002
        """Always."""
        return True

    def layout(self, dtype: DType) -> dict[str, int | None]:
        """The elements."""
        return {"raw": dtype.itemsize}

    def encode(self, raw: Bytes, dtype: DType, config: CompressConfig) -> list[Stream]:  # noqa: ARG002
        """See `Codec.encode`; nothing is copied."""
        return [Stream("raw", "raw", [raw.data] if raw.size else [])]

    def decode_chunk(self, parts: Sequence[Bytes], dtype: DType, out: Bytes) -> None:  # noqa: ARG002
        """See `Codec.decode_chunk`."""
        out[:] = parts[0]


class Zstd(Codec):
    """The tensor's bytes through zstandard, matches and all: wins where content repeats."""

    codec_id = "zstd"

    def suits(self, raw: Bytes, dtype: DType) -> bool:  # noqa: ARG002
        """Always."""
        return True

    def layout(self, dtype: DType) -> dict[str, int | None]:
        """The elements."""
        return {"data": dtype.itemsize}

    def encode(self, raw: Bytes, dtype: DType, config: CompressConfig) -> list[Stream]:
        """See `Codec.encode`."""
        return [zstd_stream("data", cut(raw, config.chunk_symbols * dtype.itemsize), config.zstd_level)]

    def decode_chunk(self, parts: Sequence[Bytes], dtype: DType, out: Bytes) -> None:  # noqa: ARG002
        """See `Codec.decode_chunk`."""
        out[:] = parts[0]
