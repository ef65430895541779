"""The safetensors layout itself: 8 bytes of header length, a JSON header, the tensors' bytes without holes.

Written here instead of by the library because a shard is streamed to disk piece by piece and its exact size is planned
before; read here because the bytes are untrusted (https://github.com/huggingface/safetensors, Format).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from modelpress.codec import Buffer
from modelpress.dtypes import DTYPES
from modelpress.errors import CorruptionError
from modelpress.strictjson import loads

MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 64
ALIGNMENT = 8
METADATA = "__metadata__"


@dataclass(frozen=True)
class Entry:
    """One tensor of the file; `parts` are its bytes in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Sequence[Buffer]

    @property
    def size_bytes(self) -> int:
        """Length of its bytes."""
        return sum(len(part) for part in self.parts)


def write(entries: Sequence[Entry], metadata: Mapping[str, str]) -> Iterator[Buffer]:
    """The file's bytes, in pieces. Wide elements come first, so that every tensor is aligned to its own width."""
    ordered = sorted(entries, key=lambda entry: -DTYPES[entry.dtype].itemsize)
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for entry in ordered:
        end = offset + entry.size_bytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = compact(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for entry in ordered:
        yield from entry.parts


def compact(document: Any) -> str:
    """JSON without spaces, in ASCII, keys in the order given."""
    return json.dumps(document, separators=(",", ":"))


def read(data: Buffer, doing: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """Tensors (one part each, a view of `data`) in the header's order, and the metadata.

    Raises:
        CorruptionError: a length beyond the file, an overlap, a hole, a duplicate, an unknown dtype, or a shape that
            does not give the length; the tensor is named, with both numbers.
    """
    view = memoryview(data)
    header, body = _split(view, doing)
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptionError(f"{doing}, {METADATA}", found=type(metadata).__name__, expected="texts by name")
    entries, spans = {}, []
    for name, info in header.items():
        dtype, shape, start, end = _fields(info, f"{doing}, tensor {name!r}")
        if not 0 <= start <= end <= len(body):
            raise CorruptionError(
                f"{doing}, tensor {name!r}",
                found=f"bytes {start} to {end}",
                expected=f"a range within {len(body)} bytes",
            )
        size = prod(shape) * DTYPES[dtype].itemsize
        if end - start != size:
            raise CorruptionError(
                f"{doing}, tensor {name!r}", found=f"{end - start} bytes", expected=f"{size} for {dtype} {list(shape)}"
            )
        entries[name] = Entry(name, dtype, shape, [body[start:end]])
        spans.append((start, end, name))
    _check_cover(spans, len(body), doing)
    return entries, metadata


def _split(view: memoryview, doing: str) -> tuple[dict[str, Any], memoryview]:
    if len(view) < 8:
        raise CorruptionError(doing, found=f"{len(view)} bytes", expected="a safetensors file, 8 bytes at least")
    length = int.from_bytes(view[:8], "little")
    if length > min(MAX_HEADER_BYTES, len(view) - 8):
        raise CorruptionError(
            doing, found=f"a header of {length} bytes", expected=f"at most {min(MAX_HEADER_BYTES, len(view) - 8)}"
        )
    return loads(bytes(view[8 : 8 + length]), f"{doing}, header"), view[8 + length :]


def _fields(info: Any, doing: str) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        raise CorruptionError(doing, found=repr(info)[:100], expected="dtype, shape and data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CorruptionError(doing, found=f"dtype {dtype!r}", expected=f"one of {', '.join(DTYPES)}")
    for numbers, what in ((shape, "shape"), (offsets, "data_offsets")):
        if not isinstance(numbers, list) or len(numbers) > MAX_RANK or not all(_is_size(number) for number in numbers):
            raise CorruptionError(doing, found=f"{what} {numbers!r}"[:200], expected="whole numbers from 0 up")
    if len(offsets) != 2:
        raise CorruptionError(doing, found=f"{len(offsets)} data_offsets", expected="2")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _is_size(number: object) -> bool:
    return type(number) is int and 0 <= number < 2**63


def _check_cover(spans: list[tuple[int, int, str]], size: int, doing: str) -> None:
    position = 0
    for start, end, name in sorted(spans):
        if start != position:
            kind = "an overlap" if start < position else "a hole"
            raise CorruptionError(
                f"{doing}, tensor {name!r}", found=f"{kind}: it begins at byte {start}", expected=f"byte {position}"
            )
        position = end
    if position != size:
        raise CorruptionError(doing, found=f"{size} bytes of tensors", expected=f"{position}, as the header says")
