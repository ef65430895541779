"""An ONNX model in two halves: the graph without weights, and the weights as named tensors.

The graph keeps its place for each large initializer (name, type, shape) and holds no bytes for it; the bytes are
tensors of the checkpoint, so that the codecs and shards that serve torch serve ONNX too. ONNX Runtime takes the halves
from memory: nothing is written to disk to make a session.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import GraphProto, ModelProto, SparseTensorProto, TensorProto
from onnxruntime.capi import onnxruntime_pybind11_state as native
from torch import Tensor

from modelpress import place
from modelpress.checkpoint import Checkpoint
from modelpress.compiled import Feed, by_row, row_axes, with_own_cache
from modelpress.cores import usable_cores
from modelpress.errors import CorruptionError, WorkloadError
from modelpress.providers import CPU, check_takes_part, provider_error, takes_one_row

GRAPH_FILE = "model.onnx"
WATCHED_GRAPH = "optimized.onnx"
INLINE_BELOW = 1024
"""Initializers of fewer bytes stay in the graph."""

_LOCATION = "tensors"
_DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.BOOL: torch.bool,
    TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    TensorProto.FLOAT8E5M2: torch.float8_e5m2,
}
"""Element types that a tensor can hold; an initializer of any other type (int4) stays in the graph."""

_REFUSALS = (
    native.Fail,
    native.InvalidArgument,
    native.InvalidGraph,
    native.InvalidProtobuf,
    native.NoModel,
    native.NoSuchFile,
    native.NotFound,
    native.NotImplemented,
)
LOST_DEVICE: tuple[type[Exception], ...] = (native.EngineError, native.EPFail)
"""What ONNX Runtime says of a device out of order."""
if hasattr(native, "DeviceReset"):  # not in 1.23
    LOST_DEVICE += (native.DeviceReset,)


@dataclass(frozen=True)
class Tuning:
    """How ONNX Runtime uses threads and memory; the defaults are its own."""

    spinning: bool = True
    """Whether threads that wait for work keep their core busy: faster between two runs, and slower for all others."""
    arena: bool = True
    """Whether memory is kept for the next run."""
    memory_pattern: bool = True
    """Whether the places of intermediate values are planned once per set of shapes."""


class Session(onnxruntime.InferenceSession):  # type: ignore[misc]
    """An ONNX Runtime session that owns the memory of its weights."""

    def __init__(
        self,
        graph: bytes,
        options: onnxruntime.SessionOptions,
        provider: str,
        told: Mapping[str, str],
        weights: list[object],
    ) -> None:
        self.operators: frozenset[str] = frozenset()
        """Names of all operators in the graph, also inside of others and of functions."""
        # ONNX Runtime reads external initializers in place and does not copy them.
        self._weights = weights
        self._one_row = takes_one_row(provider)
        # With fallback on, a call that fails on the GPU would quietly be repeated on the CPU.
        super().__init__(graph, options, providers=[(provider, dict(told))], enable_fallback=0)

    def run(self, output_names: Sequence[str] | None, input_feed: Feed, run_options: object = None) -> list[np.ndarray]:
        """As ONNX Runtime's; row by row where the provider takes one at a time."""
        one = functools.partial(super().run, output_names, run_options=run_options)
        return by_row(one, input_feed) if self._one_row else one(input_feed)


def split(model: ModelProto, threshold: int = INLINE_BELOW) -> Checkpoint:
    """Take the initializers of `threshold` bytes and more out of a model; what it does not need to run is dropped.

    The model is left as it is. Equal models give equal checkpoints, byte for byte.

    Raises:
        CorruptionError: two initializers of one name.
    """
    graph = ModelProto()
    graph.CopyFrom(model)
    strip(graph)
    tensors: dict[str, Tensor] = {}
    for initializer in graph.graph.initializer:
        if initializer.data_type not in _DTYPES:
            continue
        tensor = _to_tensor(initializer)
        if tensor.nbytes < threshold:
            continue
        if initializer.name in tensors:
            raise CorruptionError(
                f"taking initializer {initializer.name!r} out of an ONNX graph",
                found="two initializers of this name",
                expected="one",
            )
        tensors[initializer.name] = tensor
        _clear_data(initializer)
        initializer.data_location = TensorProto.EXTERNAL
        initializer.external_data.add(key="location", value=_LOCATION)
    for name in _drop_unused(graph):
        tensors.pop(name, None)
    return Checkpoint("onnx", tensors, {GRAPH_FILE: graph.SerializeToString(deterministic=True)})


def join(checkpoint: Checkpoint) -> ModelProto:
    """Put graph and tensors together again.

    Raises:
        CorruptionError: the checkpoint is no ONNX one, or the graph and the tensors do not belong together.
    """
    model = parse(checkpoint)
    for initializer in _external(model):
        tensor = _matching(initializer, checkpoint)
        initializer.ClearField("external_data")
        initializer.ClearField("data_location")
        initializer.raw_data = _to_array(tensor).tobytes()
    return model


def external(checkpoint: Checkpoint) -> tuple[ModelProto, list[TensorProto]]:
    """The graph, and those of its initializers whose bytes are the checkpoint's tensors, which may be on `meta`.

    Raises:
        CorruptionError: the checkpoint is no ONNX one, or the graph and the tensors do not belong together.
    """
    model = parse(checkpoint)
    initializers = _external(model)
    for initializer in initializers:
        _matching(initializer, checkpoint)
    return model, initializers


def session(
    checkpoint: Checkpoint,
    provider: str = CPU,
    threads: int = 0,
    tuning: Tuning | None = None,
    watch: Path | None = None,
) -> Session:
    """Make an ONNX Runtime session from memory, without a temporary file.

    Args:
        checkpoint: of kind `onnx`.
        provider: execution provider that must be in use.
        threads: intra-operator threads; 0 takes the cores that this process may use.
        tuning: of threads and memory; None leaves it to ONNX Runtime.
        watch: a folder for ONNX Runtime's own profile of each run, and for the graph as its optimiser left it
            (`WATCHED_GRAPH`); None: runs are not watched.

    Raises:
        SetupError: the provider is not in this build of ONNX Runtime, does not start on this machine, takes no part of
            the graph, or is given options that do not fit (see `place.provider_options`).
        ConfigError: MODELPRESS_PROVIDER_OPTIONS is not legal.
        CorruptionError: the checkpoint is no ONNX one, or ONNX Runtime refuses its graph.
    """
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise provider_error(provider, f"this build of ONNX Runtime has {', '.join(available)}")
    model = parse(checkpoint)
    names = [initializer.name for initializer in _external(model)]
    tensors = [_matching(initializer, checkpoint) for initializer in _external(model)]
    options = _options(model, provider, threads, tuning, watch)
    told = with_own_cache(provider, place.provider_options(provider), checkpoint)
    try:
        weights = [_to_value(one, tensor) for one, tensor in zip(_external(model), tensors, strict=True)]
        options.add_external_initializers(names, weights)
    except (ValueError, RuntimeError) as error:  # two of one name, among others
        raise CorruptionError(
            "handing the weights to ONNX Runtime", found=str(error), expected="one tensor per initializer"
        ) from error
    try:
        made = Session(checkpoint.files[GRAPH_FILE], options, provider, told, weights)
    except _REFUSALS as error:
        raise CorruptionError(
            "making an ONNX Runtime session", found=str(error), expected="a graph that ONNX Runtime accepts"
        ) from error
    except (*LOST_DEVICE, native.RuntimeException) as error:
        if provider == CPU:
            raise CorruptionError(
                "making an ONNX Runtime session", found=str(error), expected="a graph that the CPU runs"
            ) from error
        raise provider_error(provider, str(error)) from error
    except (ValueError, RuntimeError) as error:
        raise provider_error(provider, str(error)) from error
    # A provider that does not start is only logged by ONNX Runtime.
    if made.get_providers()[0] != provider:
        raise provider_error(provider, f"ONNX Runtime fell back to {made.get_providers()[0]}")
    if provider != CPU:
        check_takes_part(provider, _takers(made))
    made.operators = frozenset(_operators(model))
    return made


def _options(
    model: ModelProto, provider: str, threads: int, tuning: Tuning | None, watch: Path | None
) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.log_severity_level = 3
    if tuning is not None:
        options.enable_cpu_mem_arena, options.enable_mem_pattern = tuning.arena, tuning.memory_pattern
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if tuning.spinning else "0")
    if watch is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(watch / "run")
        options.optimized_model_filepath = str(watch / WATCHED_GRAPH)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    if not _multiplies_bytes_exactly():
        options.add_session_config_entry("session.x64quantprecision", "1")
    if provider != CPU:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for axis in row_axes(model) if takes_one_row(provider) else ():
        options.add_free_dimension_override_by_name(axis, 1)
    return options


def _takers(session: onnxruntime.InferenceSession) -> set[str]:
    """The execution providers that nodes of a session's graph were given to; ONNX Runtime before 1.24 does not tell."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return set()
    return {part.ep_name for part in session.get_provider_graph_assignment_info()}


def _operators(model: ModelProto) -> Iterator[str]:
    for graph in graphs(model):
        yield from (node.op_type for node in graph.node)
    for function in model.functions:
        yield from (node.op_type for node in function.node)


def run(session: onnxruntime.InferenceSession, inputs: Mapping[str, Tensor]) -> np.ndarray:
    """The first output of a session for named inputs; inputs that the graph does not have are left out.

    Raises:
        WorkloadError: an input of the graph is missing.
    """
    names = [one.name for one in session.get_inputs()]
    missing = sorted(set(names) - set(inputs))
    if missing:
        raise WorkloadError("running an ONNX graph", found=f"inputs {sorted(inputs)}", expected=f"also {missing}")
    output: np.ndarray = session.run(None, {name: inputs[name].numpy() for name in names})[0]
    return output


def parse(checkpoint: Checkpoint) -> ModelProto:
    """The graph of an ONNX checkpoint, its large initializers without bytes.

    Raises:
        CorruptionError: the checkpoint is no ONNX one, or a tensor inside of its graph lies in a file: whoever reads
            such a graph would take what this machine has under that name, which no digest covers.
    """
    data = checkpoint.files.get(GRAPH_FILE)
    if checkpoint.kind != "onnx" or data is None:
        raise CorruptionError(
            "reading an ONNX checkpoint",
            found=f"kind {checkpoint.kind!r} with files {sorted(checkpoint.files)}",
            expected=f"kind 'onnx' with the file {GRAPH_FILE!r}",
        )
    try:
        model = onnx.load_model_from_string(data)
    except DecodeError as error:
        raise CorruptionError(f"parsing {GRAPH_FILE}", found=str(error), expected="an ONNX graph") from error
    for tensor in _inner_tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}.get("location", "")
            raise CorruptionError(
                f"parsing {GRAPH_FILE}",
                found=f"tensor {tensor.name!r} inside of it, in file {place[:200]!r}",
                expected="every tensor in the pack: in the graph, or as an initializer of the main graph",
            )
    return model


def strip(model: ModelProto) -> None:
    """Drop in place what no runtime reads: traces of the exporter, doc strings, inferred shapes of inner values."""
    for message in (model, *model.functions):
        message.ClearField("metadata_props")
        message.ClearField("doc_string")
    for graph in graphs(model):
        for field in ("value_info", "metadata_props", "doc_string", "quantization_annotation"):
            graph.ClearField(field)
        for part in (*graph.node, *graph.initializer, *graph.input, *graph.output):
            part.ClearField("metadata_props")
            part.ClearField("doc_string")


def graphs(model: ModelProto) -> Iterator[GraphProto]:
    """The main graph and every graph nested in its nodes' attributes."""
    pending = [model.graph]
    while pending:
        graph = pending.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    pending.append(attribute.g)
                pending.extend(attribute.graphs)


def _drop_unused(model: ModelProto) -> list[str]:
    """Remove in place, and name, the initializers that nothing reads: ONNX Runtime refuses bytes for them."""
    used = {name for graph in graphs(model) for node in graph.node for name in node.input}
    used |= {one.name for graph in graphs(model) for one in graph.output}
    unused = [one for one in model.graph.initializer if one.name not in used]
    for initializer in unused:
        model.graph.initializer.remove(initializer)
    return [one.name for one in unused]


@functools.cache
def _multiplies_bytes_exactly() -> bool:
    """Whether the CPU is known to have VNNI.

    Without it, products of unsigned activations and signed weights saturate on x86, and a model judged on one machine
    answers otherwise on another. ONNX Runtime has kernels that do not saturate; they cost a third of the speed, on
    CPUs with VNNI as well, where they change nothing.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_vnni" in flags or "avx_vnni" in flags


def _external(model: ModelProto) -> list[TensorProto]:
    return [one for one in model.graph.initializer if one.data_location == TensorProto.EXTERNAL]


def _inner_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor of a model but the initializers of its main graph: in attributes, nested graphs and functions."""

    def sparse(one: SparseTensorProto) -> tuple[TensorProto, TensorProto]:
        return one.values, one.indices

    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    pending = [attribute for node in nodes for attribute in node.attribute]
    pending += [attribute for function in model.functions for attribute in function.attribute_proto]
    for one in model.graph.sparse_initializer:
        yield from sparse(one)
    while pending:
        attribute = pending.pop()
        yield from (attribute.t, *attribute.tensors)
        for one in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from sparse(one)
        for graph in (attribute.g, *attribute.graphs):
            yield from graph.initializer
            for one in graph.sparse_initializer:
                yield from sparse(one)
            pending += [inner for node in graph.node for inner in node.attribute]


def _matching(initializer: TensorProto, checkpoint: Checkpoint) -> Tensor:
    tensor = checkpoint.tensors.get(initializer.name)
    expected = f"{_DTYPES.get(initializer.data_type)} of shape {list(initializer.dims)}"
    found = "no such tensor" if tensor is None else f"{tensor.dtype} of shape {list(tensor.shape)}"
    if tensor is None or found != expected:
        raise CorruptionError(
            f"filling initializer {initializer.name!r} of the ONNX graph", found=found, expected=expected
        )
    return tensor


def _to_tensor(initializer: TensorProto) -> Tensor:
    """Initializer as a tensor of its own memory."""
    dtype, shape = _DTYPES[initializer.data_type], tuple(initializer.dims)
    if initializer.HasField("raw_data"):
        data = bytearray(initializer.raw_data)
        return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)
    array = np.ascontiguousarray(onnx.numpy_helper.to_array(initializer))
    return torch.from_numpy(array.reshape(-1).view(np.uint8).copy()).view(dtype).reshape(shape)


def _clear_data(initializer: TensorProto) -> None:
    for name in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data"):
        initializer.ClearField(name)


def _to_array(tensor: Tensor) -> np.ndarray:
    """Tensor as an array that shares its memory; types that numpy lacks become integers of their width."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    elif tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        tensor = tensor.view(torch.uint8)
    return tensor.numpy()


def _to_value(initializer: TensorProto, tensor: Tensor) -> onnxruntime.OrtValue:
    array = _to_array(tensor)
    if array.dtype == onnx.helper.tensor_dtype_to_np_dtype(initializer.data_type):
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, initializer.data_type)
