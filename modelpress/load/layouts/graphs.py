"""An ONNX graph with its weights in files beside it, as ONNX Runtime loads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from onnx import ModelProto

from modelpress import graph
from modelpress.checkpoint import Checkpoint
from modelpress.container.tensors import TORCH_DTYPES
from modelpress.errors import ConfigError, CorruptionError
from modelpress.load.layouts.writing import Place, read_file, write_file, write_files, write_tensors
from modelpress.load.read import Parts
from modelpress.manifest import Manifest

DATA_FILE_BYTES = 2**31
"""A new file of weights is begun when one would grow beyond this."""
PAGE_BYTES = 4096
"""Each tensor begins at a multiple of this, so that it can be mapped where it lies."""
DATA_FILE = f"{graph.GRAPH_FILE}.data"


def onnx_names(manifest: Manifest) -> list[str]:
    """The files that `write_onnx` makes beside the pack's own.

    Raises:
        ConfigError: the pack is no graph.
    """
    if manifest.kind != "onnx":
        raise ConfigError(
            f"laying out pack {manifest.name} as a graph",
            found=f"layout onnx of a {manifest.kind} pack",
            expected="layout checkpoint, or huggingface for a folder; a pack of a graph is what `modelpress run` makes",
        )
    return sorted({place.file for place in _places(manifest).values()})


def write_onnx(
    manifest: Manifest, parts: Parts, folder: Path, change: Callable[[ModelProto], object] | None = None
) -> ModelProto:
    """``model.onnx`` and its weights: in ``model.onnx.data``, or in several files where they are more than 2 GiB.

    Args:
        manifest: of the pack.
        parts: what it is read with.
        folder: empty.
        change: of the graph, in place, before anything is written.

    Returns:
        the graph as written.

    Raises:
        CorruptionError: the pack's graph and its tensors do not belong together.
    """
    places = _places(manifest)
    model = _located(manifest, read_file(manifest, parts, graph.GRAPH_FILE), places)
    if change is not None:
        change(model)
    write_file(folder / graph.GRAPH_FILE, model.SerializeToString(deterministic=True))
    write_tensors(parts, folder, dict.fromkeys(onnx_names(manifest), b""), places)
    write_files(manifest, parts, folder, but=[graph.GRAPH_FILE])
    return model


def _located(manifest: Manifest, data: bytes, places: dict[str, Place]) -> ModelProto:
    """The graph, with each initializer that has no bytes told where they are.

    Its tensors are compared by type and shape before one of them is fetched.
    """
    claimed = {
        tensor.name: torch.empty(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype], device="meta")
        for tensor in manifest.tensors
    }
    model, externals = graph.external(Checkpoint("onnx", claimed, {graph.GRAPH_FILE: data}))
    unknown = sorted(claimed.keys() - {one.name for one in externals})
    if unknown:
        raise CorruptionError(
            f"laying out pack {manifest.name} as a graph",
            found=f"{len(unknown)} tensors that {graph.GRAPH_FILE} does not name, first {unknown[0]!r}",
            expected="only its initializers",
        )
    sizes = {tensor.name: tensor.raw_bytes for tensor in manifest.tensors}
    for initializer in externals:
        place = places[initializer.name]
        initializer.ClearField("external_data")
        facts = {"location": place.file, "offset": place.offset, "length": sizes[initializer.name]}
        for key, value in facts.items():
            initializer.external_data.add(key=key, value=str(value))
    return model


def _places(manifest: Manifest) -> dict[str, Place]:
    """Where each tensor goes, in the manifest's order."""
    numbers: dict[str, tuple[int, int]] = {}
    number = end = 0
    for tensor in manifest.tensors:
        start = -(-end // PAGE_BYTES) * PAGE_BYTES
        if end and start + tensor.raw_bytes > DATA_FILE_BYTES:
            number, start = number + 1, 0
        numbers[tensor.name] = (number, start)
        end = start + tensor.raw_bytes
    count = number + 1
    names = [DATA_FILE] if count == 1 else [f"{DATA_FILE}-{one:05d}-of-{count:05d}" for one in range(1, count + 1)]
    return {name: Place(names[position], offset) for name, (position, offset) in numbers.items()}
