"""Hugging Face folders: safetensors files with their index, and every other file byte for byte.

A pack that was published from a folder knows the headers of the files that its tensors came from (`hf_origin`), and
becomes the very files that it was made of. Any other pack gets safetensors files of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from modelpress import hf_origin
from modelpress.container.safetensors_file import ALIGNMENT, METADATA, compact
from modelpress.dtypes import DTYPES
from modelpress.errors import ConfigError
from modelpress.load.layouts.writing import Place, read_file, write_file, write_files, write_tensors
from modelpress.load.read import Parts
from modelpress.manifest import Manifest, TensorEntry
from modelpress.strictjson import loads

PULLED_SHARD_BYTES = 2**32
"""Where a pack names no files of its own, a new one is begun when one would grow beyond this."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
COMPRESSED_TENSORS = "compressed-tensors"


def checkpoint_names(manifest: Manifest) -> list[str]:
    """The files that `write_checkpoint` makes beside the pack's own.

    Raises:
        CorruptionError: see `hf_origin.read_origin`.
    """
    origin = hf_origin.read_origin(manifest)
    if origin is not None:
        return list(origin.headers)
    groups = _grouped(manifest)
    return [*groups, *([INDEX] if len(groups) > 1 else [])]


def folder_names(manifest: Manifest) -> list[str]:
    """As `checkpoint_names`, of a pack that was published from a folder.

    Raises:
        ConfigError: it was not.
    """
    if hf_origin.read_origin(manifest) is None:
        raise ConfigError(
            f"laying out pack {manifest.name} as a Hugging Face folder",
            found=f"a pack of kind {manifest.kind} that was not published from one",
            expected="a pack that `modelpress publish FOLDER` made",
            fix="pull it as onnx or triton"
            if manifest.kind == "onnx"
            else "pull it as checkpoint: its tensors, under the names that its own module gives them",
        )
    return checkpoint_names(manifest)


def write_checkpoint(manifest: Manifest, parts: Parts, folder: Path) -> None:
    """Safetensors files, with an index where there are several, and the pack's files."""
    origin = hf_origin.read_origin(manifest)
    if origin is not None:
        heads = {name: hf_origin.head(text) for name, text in origin.headers.items()}
        places = {name: Place(*span) for name, span in hf_origin.spans(manifest, origin).items()}
    else:
        heads, places = {}, {}
        for file, tensors in _grouped(manifest).items():
            heads[file], offsets = _header(tensors)
            places |= {name: Place(file, offset) for name, offset in offsets.items()}
    write_tensors(parts, folder, heads, places)
    if origin is None and len(heads) > 1:
        total = sum(tensor.raw_bytes for tensor in manifest.tensors)
        index = {"metadata": {"total_size": total}, "weight_map": {name: place.file for name, place in places.items()}}
        write_file(folder / INDEX, json.dumps(index, indent=2, sort_keys=True).encode())
    write_files(manifest, parts, folder)


def write_compressed_tensors(manifest: Manifest, parts: Parts, folder: Path) -> None:
    """The folder, if its config.json says that it is in the layout of compressed-tensors.

    Raises:
        ConfigError: it does not.
    """
    doing = f"laying out pack {manifest.name} as compressed-tensors"
    config = loads(read_file(manifest, parts, CONFIG), f"{doing}, {CONFIG}")
    stated = config.get("quantization_config")
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    if method != COMPRESSED_TENSORS:
        raise ConfigError(
            doing,
            found=f"quant_method {method!r} in its {CONFIG}" if method else f"no quantization_config in its {CONFIG}",
            expected=repr(COMPRESSED_TENSORS),
            fix="make such a folder with `modelpress quantize RECIPE --as compressed-tensors --to FOLDER`, publish it "
            "with `modelpress publish FOLDER --name NAME`, and pull that; or pull this one as huggingface",
        )
    write_checkpoint(manifest, parts, folder)


def _grouped(manifest: Manifest) -> dict[str, list[TensorEntry]]:
    """The tensors of each file, in the manifest's order."""
    groups: list[list[TensorEntry]] = [[]]
    filled = 0
    for tensor in manifest.tensors:
        if groups[-1] and filled + tensor.raw_bytes > PULLED_SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.raw_bytes
    count = len(groups)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return dict(zip(names if count > 1 else [SINGLE], groups, strict=True))


def _header(tensors: Sequence[TensorEntry]) -> tuple[bytes, dict[str, int]]:
    """What stands before the first tensor of a safetensors file, and where in the file each begins.

    Wide elements come first, so that every tensor is aligned to its own width.
    """
    header: dict[str, object] = {METADATA: {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for tensor in sorted(tensors, key=lambda one: (-DTYPES[one.dtype].itemsize, one.name)):
        offsets[tensor.name], end = end, end + tensor.raw_bytes
        info = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offsets[tensor.name], end]}
        header[tensor.name] = info
    text = compact(header)
    head = hf_origin.head(text + " " * (-len(text) % ALIGNMENT))
    return head, {name: len(head) + offset for name, offset in offsets.items()}
