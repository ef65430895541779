"""A model repository as the Triton Inference Server reads it: ``NAME/config.pbtxt`` and ``NAME/1/model.onnx``.

The format is Triton's ``model_config.proto``; the rules of batching are those of its documentation, "Model
Configuration". There is one version, 1: which pack it is, the manifest says.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from onnx import ModelProto, TensorProto, ValueInfoProto

from modelpress import graph
from modelpress.errors import ConfigError
from modelpress.load.layouts.graphs import write_onnx
from modelpress.load.layouts.writing import write_file
from modelpress.load.read import Parts
from modelpress.manifest import Manifest

CONFIG_FILE = "config.pbtxt"
VERSION = "1"
MAX_BATCH_SIZE = 32
"""Most samples that Triton puts together into one call."""
MAX_QUEUE_DELAY_MICROSECONDS = 500
"""How long a request waits for others to share its call."""

TYPES: dict[int, str] = {
    TensorProto.BOOL: "TYPE_BOOL",
    TensorProto.UINT8: "TYPE_UINT8",
    TensorProto.UINT16: "TYPE_UINT16",
    TensorProto.UINT32: "TYPE_UINT32",
    TensorProto.UINT64: "TYPE_UINT64",
    TensorProto.INT8: "TYPE_INT8",
    TensorProto.INT16: "TYPE_INT16",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.DOUBLE: "TYPE_FP64",
    TensorProto.BFLOAT16: "TYPE_BF16",
    TensorProto.STRING: "TYPE_STRING",
}
"""Triton's name of an ONNX element type."""

Axes = list[int | str]
"""Of one input or output: sizes, and names of those that vary."""


def write_triton(manifest: Manifest, parts: Parts, folder: Path) -> None:
    """The graph and the pack's other files in ``NAME/1``, and ``NAME/config.pbtxt``.

    Raises:
        ConfigError: an input or output that Triton has no type for.
        CorruptionError: see `write_onnx`.
    """
    model = write_onnx(manifest, parts, folder / manifest.name / VERSION)
    write_file(folder / manifest.name / CONFIG_FILE, config(manifest.name, model).encode())


def config(name: str, model: ModelProto) -> str:
    """``config.pbtxt`` of a graph.

    Where every input and output begins with one and the same axis that varies, Triton may batch requests along it. The
    configuration then leaves that axis out, as Triton asks.

    Raises:
        ConfigError: an input or output that Triton has no type for.
    """
    weights = {one.name for one in model.graph.initializer}
    inputs = [_signature(name, one) for one in model.graph.input if one.name not in weights]
    outputs = [_signature(name, one) for one in model.graph.output]
    batches = _batches([axes for _, _, axes in (*inputs, *outputs)])
    lines = [
        f"name: {_quoted(name)}",
        'backend: "onnxruntime"',
        f"default_model_filename: {_quoted(graph.GRAPH_FILE)}",
        f"max_batch_size: {MAX_BATCH_SIZE if batches else 0}",
    ]
    for field, signatures in (("input", inputs), ("output", outputs)):
        for label, kind, axes in signatures:
            lines += _block(field, label, kind, axes[1:] if batches else axes)
    lines += ["instance_group [", "  { count: 1 kind: KIND_AUTO }", "]"]
    if batches:
        lines += ["dynamic_batching {", f"  max_queue_delay_microseconds: {MAX_QUEUE_DELAY_MICROSECONDS}", "}"]
    return "\n".join(lines) + "\n"


def _signature(name: str, value: ValueInfoProto) -> tuple[str, str, Axes]:
    """Name, Triton's type and axes of an input or output; an axis that varies namelessly is named after its place."""
    doing = f"laying out pack {name} for Triton, {value.name!r} of its graph"
    kind = value.type.tensor_type.elem_type
    if not value.type.HasField("tensor_type") or kind not in TYPES:
        found = TensorProto.DataType.Name(kind) if value.type.HasField("tensor_type") else "no tensor"
        raise ConfigError(doing, found=found, expected=f"one of {', '.join(TYPES.values())}")
    if not value.type.tensor_type.HasField("shape"):
        raise ConfigError(doing, found="any number of axes", expected="a shape, whose axes may vary")
    axes: Axes = []
    for number, axis in enumerate(value.type.tensor_type.shape.dim):
        fixed = axis.WhichOneof("value") == "dim_value" and axis.dim_value > 0
        axes.append(axis.dim_value if fixed else axis.dim_param or f"{value.name}#{number}")
    return value.name, TYPES[kind], axes


def _batches(axes: Sequence[Axes]) -> bool:
    """Whether the first axis of all is one that varies, by its name the same everywhere."""
    firsts = {one[0] if one else None for one in axes}
    return len(firsts) == 1 and isinstance(next(iter(firsts)), str)


def _block(field: str, label: str, kind: str, axes: Axes) -> Iterable[str]:
    """An input or output. Triton takes no empty shape: a scalar is one element to its clients, and reshaped."""
    dims = [axis if isinstance(axis, int) else -1 for axis in axes]
    yield f"{field} ["
    yield "  {"
    yield f"    name: {_quoted(label)}"
    yield f"    data_type: {kind}"
    yield f"    dims: [ {', '.join(map(str, dims or [1]))} ]"
    if not dims:
        yield "    reshape { shape: [ ] }"
    yield "  }"
    yield "]"


def _quoted(text: str) -> str:
    """A string of protobuf's text format, whose escapes are octal bytes."""
    if text.isascii() and text.isprintable():
        return json.dumps(text)
    return '"' + "".join(f"\\{byte:03o}" for byte in text.encode()) + '"'
