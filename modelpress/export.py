"""From a torch module to the ONNX graph that is served.

The graph has the workload's dynamic axes by name, nodes and weights named after the modules they come from, and is
compared with the module on inputs of several sizes before anyone else sees it.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import logging
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto
from torch import Tensor, nn

from modelpress import graph
from modelpress.checkpoint import Checkpoint
from modelpress.config import ExportConfig
from modelpress.errors import CorruptionError, ExportError, WorkloadError
from modelpress.reports import ExportReport
from modelpress.workload import Workload

Inputs = dict[str, Tensor]

EXAMPLE_BATCH = 3
"""Samples that a module is traced with: neither 0 nor 1, which tracers take for constants."""
_CHECKED_BATCHES = (1, 2, 7)
_SCOPES_KEY = "pkg.torch.onnx.name_scopes"
_NO_SCOPE = "_empty_nn_module_stack_from_metadata_hook"
_WEIGHTED = ("MatMul", "Gemm", "Conv", "ConvTranspose")


def export(module: nn.Module, workload: Workload, config: ExportConfig) -> tuple[Checkpoint, ExportReport]:
    """Export a module, in eval mode and on the CPU, and prove that the graph computes what it computes.

    Returns:
        An `onnx` checkpoint (see `graph.split`) and what was found.

    Raises:
        WorkloadError: the module does not take the workload's example inputs.
        ExportError: a part of the module has no ONNX form (it is named) or none in `config.opset`, ONNX Runtime
            refuses the graph, or its outputs differ from the module's by more than `config.tolerance`.
    """
    module = module.eval()
    example = workload.example(EXAMPLE_BATCH)
    run_torch(module, example)
    with quiet():
        try:
            program = torch.onnx.export(
                module,
                (),
                kwargs=example,
                dynamo=True,
                dynamic_shapes=_dynamic_shapes(workload, example),
                opset_version=config.opset,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise _failure(module, example, error) from error
    assert program is not None  # only with a file to write to does the exporter return nothing
    model = program.model_proto
    _check_opset(model, config.opset)
    _name_after_modules(model)
    _share_weights(model)
    _name_output(model, workload.output_name)
    checkpoint = graph.split(model)
    _check(checkpoint)
    difference = _largest_difference(module, checkpoint, workload, config.tolerance)
    return checkpoint, ExportReport(opset=config.opset, nodes=len(model.graph.node), max_difference=difference)


def check_inputs(workload: Workload) -> Iterator[tuple[str, Inputs]]:
    """Inputs of several batch sizes, and of half the length on each further dynamic axis, each with a description."""
    axes = workload.dynamic_axes()
    for batch_size in _CHECKED_BATCHES:
        yield f"batch {batch_size}", workload.example(batch_size)
    names = {name for by_axis in axes.values() for axis, name in by_axis.items() if axis != 0}
    for name in sorted(names):
        inputs = workload.example(_CHECKED_BATCHES[-1])
        for key, by_axis in axes.items():
            for axis, axis_name in by_axis.items():
                if axis_name == name:
                    inputs[key] = inputs[key].narrow(axis, 0, max(1, inputs[key].shape[axis] // 2)).contiguous()
        yield f"batch {_CHECKED_BATCHES[-1]}, {name} halved", inputs


def _check_opset(model: ModelProto, opset: int) -> None:
    """The exporter only logs that it could not convert a graph to the operator set that was asked for."""
    found = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)
    if found != opset:
        raise ExportError(
            "converting the exported graph to export.opset",
            found=f"operator set {found}, with operators that cannot be converted",
            expected=f"operator set {opset}",
            fix=f"set export.opset to {found}, or a later one",
        )


def _check(checkpoint: Checkpoint) -> None:
    """Run ONNX's own checker; weights stand as inputs, so that no model is too large for it (2 GiB)."""
    model = graph.parse(checkpoint)
    for initializer in list(model.graph.initializer):
        if initializer.data_location == TensorProto.EXTERNAL:
            model.graph.input.append(
                onnx.helper.make_tensor_value_info(initializer.name, initializer.data_type, initializer.dims)
            )
            model.graph.initializer.remove(initializer)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError("checking the exported graph", found=str(error), expected="a valid ONNX model") from error


def _largest_difference(module: nn.Module, checkpoint: Checkpoint, workload: Workload, tolerance: float) -> float:
    try:
        session = graph.session(checkpoint)
    except CorruptionError as error:
        raise ExportError(
            "loading the exported graph in ONNX Runtime",
            found=error.found,
            expected="operators of types that ONNX Runtime has",
            fix="another export.opset, or float32 where the module computes in another type",
        ) from error
    largest = 0.0
    for description, inputs in check_inputs(workload):
        expected = run_torch(module, inputs).numpy()
        found = graph.run(session, inputs)
        if found.shape != expected.shape:
            raise ExportError(
                f"comparing the exported graph with the torch module on {description}",
                found=f"an output of shape {list(found.shape)}",
                expected=f"{list(expected.shape)}",
                fix="name every axis that differs per call in the workload's dynamic_axes()",
            )
        difference = float(np.abs(found.astype(np.float64) - expected).max(initial=0.0))
        if not difference <= tolerance:
            raise ExportError(
                f"comparing the exported graph with the torch module on {description}",
                found=f"outputs that differ by up to {difference:.3g}",
                expected=f"at most export.tolerance, {tolerance:.3g}",
                fix="raise export.tolerance if the difference is rounding; otherwise look for code that depends on "
                "the values or the shape of its input",
            )
        largest = max(largest, difference)
    return largest


def run_torch(module: nn.Module, inputs: Inputs) -> Tensor:
    """The module's one output.

    Raises:
        WorkloadError: it does not take these inputs, or gives anything but one tensor.
    """
    try:
        with torch.inference_mode():
            output = module(**inputs)
    except (TypeError, RuntimeError, ValueError, IndexError) as error:
        raise WorkloadError(
            f"running {type(module).__name__} on the workload's example",
            found=str(error),
            expected=f"a module that takes {_describe(inputs)} as keyword arguments",
            fix="name the entries of Batch.inputs after the parameters of forward",
        ) from error
    if not isinstance(output, Tensor):
        raise WorkloadError(
            f"running {type(module).__name__} on the workload's example",
            found=f"an output of type {type(output).__name__}",
            expected="one tensor",
            fix="wrap the module in one whose forward returns the tensor that is served",
        )
    return output


def _describe(inputs: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name}: {tensor.dtype} {list(tensor.shape)}" for name, tensor in inputs.items())


def _dynamic_shapes(workload: Workload, example: Inputs) -> dict[str, dict[int, str]]:
    axes = workload.dynamic_axes()
    unknown = sorted(set(axes) - set(example))
    if unknown:
        raise WorkloadError(
            "reading the workload's dynamic_axes()", found=f"{unknown}", expected=f"inputs among {sorted(example)}"
        )
    return {name: dict(axes.get(name, {})) for name in example}


def _failure(module: nn.Module, example: Inputs, error: Exception) -> ExportError:
    """The error that names the innermost module that cannot be exported by itself."""
    name, culprit, cause = "", module, error
    calls = _record_calls(module, example)
    while True:
        for child_name, child in culprit.named_children():
            qualified = f"{name}.{child_name}" if name else child_name
            failed = _export_error(child, calls[qualified]) if qualified in calls else None
            if failed is not None:
                name, culprit, cause = qualified, child, failed
                break
        else:
            break
    where = f"module {name!r} ({type(culprit).__name__})" if name else f"the model ({type(culprit).__name__})"
    return ExportError(
        f"exporting {where} to ONNX",
        found=_first_lines(cause),
        expected="a forward that torch.export can trace, of operators that ONNX has",
        fix=f"rewrite {type(culprit).__name__}.forward without branches on tensor values, .item() and custom "
        "operators, or replace the module before optimising",
    )


def _record_calls(module: nn.Module, example: Inputs) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of the first call of each submodule, by qualified name."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def recorder(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(name, (args, kwargs))

        return hook

    handles = [
        child.register_forward_pre_hook(recorder(name), with_kwargs=True)
        for name, child in module.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            module(**example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _export_error(module: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Exception | None:
    """What exporting this module alone raises; its tensors' batch axis is dynamic, as in the whole."""
    args, kwargs = call
    shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == EXAMPLE_BATCH:
            shapes[value] = {0: torch.export.Dim.DYNAMIC}
    try:
        torch.onnx.export(module, args, kwargs=kwargs, dynamo=True, dynamic_shapes=shapes, verbose=False)
    except torch.onnx.OnnxExporterError as error:
        return error
    return None


def _first_lines(error: Exception) -> str:
    """The root cause's message, without the exporter's banner."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"[:600]


def _name_after_modules(model: ModelProto) -> None:
    """Rename nodes to `<module>.<operator>` and folded weights to `<node>.weight`, so that configs and reports can
    speak of them; the exporter's own names are counters."""
    taken: Counter[str] = Counter()
    initializers = {one.name: one for one in model.graph.initializer}
    for node in model.graph.node:
        scope = _weight_scope(node, initializers) or _scope(node)
        name = f"{scope}.{node.op_type}" if scope else node.op_type
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name] - 1}"
    parameters = {name for name in initializers if not _is_counter(name)}
    renamed: dict[str, str] = {}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name in initializers and name not in parameters and name not in renamed:
                role = "weight" if index == 1 and node.op_type in _WEIGHTED else f"input{index}"
                renamed[name] = f"{node.name}.{role}"
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    for name, initializer in initializers.items():
        initializer.name = renamed.get(name, name)


def _share_weights(model: ModelProto) -> None:
    """Store once what stands there twice: folding constants copies, and often transposes, a tied weight.

    A copy is replaced by the original, a transposed copy by a Transpose, which ONNX Runtime folds as it loads.
    """
    originals: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    replaced: dict[str, str] = {}
    transposes: list[NodeProto] = []
    for initializer in model.graph.initializer:
        array = onnx.numpy_helper.to_array(initializer)
        if array.nbytes < graph.INLINE_BELOW:
            continue
        found = originals.setdefault(_content(initializer.data_type, array), initializer.name)
        turned = originals.get(_content(initializer.data_type, array.T)) if array.ndim == 2 else None
        if found != initializer.name:
            replaced[initializer.name] = found
        elif turned is not None and turned != initializer.name:
            replaced[initializer.name] = f"{initializer.name}_transposed"
            node = onnx.helper.make_node(
                "Transpose", [turned], [replaced[initializer.name]], f"{initializer.name}.Transpose", perm=[1, 0]
            )
            transposes.append(node)
    for body in graph.graphs(model):
        for node in body.node:
            node.input[:] = [replaced.get(value, value) for value in node.input]
    for node in reversed(transposes):
        model.graph.node.insert(0, node)


def _content(data_type: int, array: np.ndarray) -> tuple[int, tuple[int, ...], bytes]:
    return data_type, array.shape, hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()


def _name_output(model: ModelProto, name: str) -> None:
    """Rename the first output. The exporter's own renaming clashes with inner values of that name (`embedding`)."""
    old = model.graph.output[0].name
    if any(one.name == name for one in model.graph.input):
        raise WorkloadError("naming the graph's output", found=f"{name!r}, an input's name", expected="another name")
    renamed = {old: name, name: f"{name}_inner"} if old != name else {}
    for body in graph.graphs(model):
        for node in body.node:
            node.input[:] = [renamed.get(value, value) for value in node.input]
            node.output[:] = [renamed.get(value, value) for value in node.output]
        for one in (*body.initializer, *body.output):
            one.name = renamed.get(one.name, one.name)


def _is_counter(name: str) -> bool:
    return "." not in name


def _weight_scope(node: NodeProto, initializers: Collection[str]) -> str:
    """Module of the node's weight: a convolution that took in a normalisation carries the latter's scope."""
    weight = node.input[1] if node.op_type in _WEIGHTED and len(node.input) > 1 else ""
    return weight.removesuffix(".weight") if weight in initializers and weight.endswith(".weight") else ""


def _scope(node: NodeProto) -> str:
    for entry in node.metadata_props:
        if entry.key == _SCOPES_KEY:
            scopes = [scope for scope in ast.literal_eval(entry.value)[:-1] if scope != _NO_SCOPE]
            return str(scopes[-1]) if scopes else ""
    return ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's warnings and log lines; its errors are exceptions."""
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch._export", "onnxscript", "onnx_ir")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
