"""What a pack remembers of the Hugging Face folder that it was published from: its safetensors files' headers.

A header says which tensors a file holds, in which order, and carries its author's metadata. With it and the tensors the
file can be written again, byte for byte. It stands in the manifest's metadata::

    {"huggingface": {"headers": {FILE: TEXT, ...}, "model": [FILE, ...]}}

TEXT is the header's JSON as it was, its padding included. Tensors of the files in `model` have their own names in the
pack; those of other files (an adapter's, a dense layer's in a folder below) have the name ``FILE:NAME``.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelpress.container.safetensors_file import MAX_HEADER_BYTES, METADATA
from modelpress.errors import CorruptionError
from modelpress.manifest import Manifest, TensorEntry
from modelpress.strictjson import loads

KEY = "huggingface"
"""In the manifest's metadata."""


class Origin(BaseModel):
    """The safetensors files of a folder, without their tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    headers: dict[str, str] = Field(min_length=1)
    """By file, relative to the folder: the text of its header."""
    model: Annotated[list[str], Field(max_length=100_000)]
    """The files whose tensors have their own names in the pack."""

    def name_of(self, file: str, tensor: str) -> str:
        """The name in the pack of a file's tensor."""
        return tensor if file in self.model else f"{file}:{tensor}"

    def to_metadata(self) -> dict[str, Any]:
        """Its part of a manifest's metadata."""
        return {KEY: self.model_dump(mode="json")}


def head(text: str) -> bytes:
    """The bytes before a file's first tensor."""
    data = text.encode()
    return len(data).to_bytes(8, "little") + data


def read_origin(manifest: Manifest) -> Origin | None:
    """What a pack says of its folder; None for a pack that was not published from one.

    Raises:
        CorruptionError: it is not what this module writes; see `spans` for what else is checked.
    """
    if KEY not in manifest.metadata:
        return None
    doing = f"reading how pack {manifest.name} was laid out"
    try:
        origin = Origin.model_validate(manifest.metadata[KEY])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CorruptionError(doing, found=f"{where}: {first['msg']}"[:200], expected="headers by file") from error
    for name in origin.headers:
        parts = name.split("/")
        if any(part in ("", ".", "..") for part in parts) or any(c < " " or c in "\\:\x7f" for c in name):
            raise CorruptionError(doing, found=f"a file {name!r}"[:200], expected="relative paths of plain names")
    return origin


def spans(manifest: Manifest, origin: Origin) -> dict[str, tuple[str, int]]:
    """By tensor of the pack: its file, and the offset in it at which its bytes begin.

    Raises:
        CorruptionError: a header that does not have the pack's tensors, each once, side by side.
    """
    known = {tensor.name: tensor for tensor in manifest.tensors}
    found: dict[str, tuple[str, int]] = {}
    for file, text in origin.headers.items():
        doing = f"reading the header of {file!r} in pack {manifest.name}"
        begin = len(head(text))
        if begin > MAX_HEADER_BYTES + 8:
            raise CorruptionError(doing, found=f"{begin - 8} bytes", expected=f"at most {MAX_HEADER_BYTES}")
        header = loads(text.encode(), doing)
        header.pop(METADATA, None)
        ends = 0
        held = [_span(header, name, known, origin.name_of(file, name), doing) for name in header]
        for start, end, name in sorted(held):
            if start != ends:
                raise CorruptionError(f"{doing}, tensor {name!r}", found=f"byte {start}", expected=f"byte {ends}")
            ends = end
            own = origin.name_of(file, name)
            if own in found:
                raise CorruptionError(f"{doing}, tensor {name!r}", found="it twice", expected="once")
            found[own] = (file, begin + start)
    if missing := known.keys() - found.keys():
        raise CorruptionError(
            f"reading how pack {manifest.name} was laid out",
            found=f"no place for tensor {min(missing)!r}",
            expected=f"one for each of {len(known)} tensors",
        )
    return found


def _span(
    header: dict[str, Any], name: str, known: dict[str, TensorEntry], own: str, doing: str
) -> tuple[int, int, str]:
    """Where a tensor lies behind the header, if that is the pack's tensor `own`."""
    info, entry, doing = header[name], known.get(own), f"{doing}, tensor {name!r}"
    if entry is None:
        raise CorruptionError(doing, found="no such tensor in the pack", expected=f"a tensor {own!r}")
    offsets = info.get("data_offsets") if isinstance(info, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(number) is int for number in offsets):
        raise CorruptionError(doing, found=repr(info)[:100], expected="dtype, shape and data_offsets")
    found = (info.get("dtype"), info.get("shape"), offsets[1] - offsets[0])
    expected = (entry.dtype, list(entry.shape), entry.raw_bytes)
    if found != expected:
        raise CorruptionError(doing, found=f"{found}"[:200], expected=f"{expected}")
    return offsets[0], offsets[1], name
