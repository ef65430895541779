"""From a torch module to StableHLO, which OpenXLA's compilers take: those of TPUs, and here that of the CPU.

`torch.export` traces the module, torchax spells it in JAX's operators, and `jax.export` lowers that for several kinds
of processors at a time, with axes that vary. What is written runs with JAX alone, and holds no pickle: the program is a
flatbuffer, the weights a safetensors file. It is read back and run by OpenXLA on this machine before anybody gets it;
on a TPU none was run.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export.graph_signature import InputKind

from modelpress.config import ExportConfig
from modelpress.errors import ExportError, SetupError
from modelpress.export import EXAMPLE_BATCH, check_inputs, quiet, run_torch
from modelpress.progress import Progress, silent
from modelpress.reports import StableHloReport
from modelpress.store.local import check_new_folder, local_errors
from modelpress.workload import Workload

PROGRAM_FILE, WEIGHTS_FILE, REPORT_FILE = "model.jax", "model.safetensors", "model.json"
PLATFORMS = ("cpu", "tpu")
"""The program is lowered for each; no TPU is needed for that."""
LARGEST = 2**31
"""A bound beyond it is none."""
PACKAGES = ("torchax", "jax", "jaxlib")
NAMED_AXES = {
    "all": "dimname dimname_out",
    "index_add": "dimname",
    "index_copy": "dimname",
    "index_copy_": "dimname",
    "index_fill": "Dimname_Scalar Dimname_Tensor",
    "index_fill_": "Dimname_Scalar Dimname_Tensor",
    "norm": "names_ScalarOpt_dim names_ScalarOpt_dim_dtype names_dtype_out names_out",
    "prod": "dim_Dimname",
    "std": "correction_names correction_names_out names_dim names_out",
    "std_mean": "correction_names names_dim",
    "unbind": "Dimname",
}
"""Operators of torch, and their overloads that torchax names."""


@dataclass(frozen=True)
class _Lowered:
    program: bytes
    weights: Mapping[str, Any]
    """JAX arrays by the module's names."""


def export_stablehlo(
    module: nn.Module, workload: Workload, config: ExportConfig, folder: Path, progress: Progress = silent
) -> StableHloReport:
    """Write a module, in eval mode and on the CPU, as StableHLO with its weights, and prove what it computes.

    Args:
        module: as it comes from the source, or distilled or pruned.
        workload: whose example inputs it is traced with, and whose dynamic axes vary.
        config: `tolerance`; `opset` is of ONNX graphs.
        folder: new or empty. It gets ``model.jax``, which `jax.export.deserialize` reads, ``model.safetensors`` and
            ``model.json``, the report.
        progress: told of the steps.

    Raises:
        SetupError: torchax or JAX is not installed.
        ConfigError: something is in the folder.
        WorkloadError: the module does not take the workload's example inputs.
        ExportError: it can't be traced or has no form in StableHLO, or its outputs there differ by more than
            `config.tolerance`.
    """
    doing = f"exporting {type(module).__name__} to StableHLO"
    check_folder(folder)
    module = module.eval()
    progress(0, 3, "tracing")
    with quiet():
        program = _traced(module, workload, doing)
        progress(1, 3, "lowering")
        lowered = _lowered(program, workload, doing)
        progress(2, 3, "running")
        difference = _largest_difference(module, lowered, workload, config.tolerance, doing)
    report = StableHloReport(
        platforms=list(PLATFORMS),
        weights=len(lowered.weights),
        weights_bytes=sum(int(array.nbytes) for array in lowered.weights.values()),
        program_bytes=len(lowered.program),
        ran_on=_backend(),
        max_difference=difference,
        versions={name: importlib.metadata.version(name) for name in ("torch", *PACKAGES)},
    )
    _write(folder, lowered, report, doing)
    progress(3, 3, "written")
    return report


def check_folder(folder: Path) -> None:
    """Refuse what would fail at the end: a folder that holds something, and missing packages.

    Raises:
        see `export_stablehlo`.
    """
    doing = f"exporting to StableHLO in {folder}"
    check_new_folder(folder, doing)
    missing = []
    for name in PACKAGES:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise _setup_error(doing, f"no {', '.join(missing)}")
    try:
        _import_torchax()
    except (ImportError, AttributeError) as error:  # it asks torch for operators that another version may not have
        version = importlib.metadata.version("torchax")
        found = f"torchax {version} does not load beside torch {torch.__version__}: {_first_line(error)}"
        raise _setup_error(doing, found) from error


def _import_torchax() -> None:
    """Import torchax, which lists overloads for tensors with named axes (0.0.13); torch has none since 2.13.

    While it is imported, the operator's first overload stands for each: what it lists is to be cast or decomposed, and
    nothing here has named axes.
    """
    stand_ins: list[tuple[Any, str]] = []
    for operator, names in NAMED_AXES.items():
        packet: Any = getattr(torch.ops.aten, operator)
        for name in names.split():
            if not hasattr(packet, name):
                setattr(packet, name, getattr(packet, packet.overloads()[0]))
                stand_ins.append((packet, name))
    try:
        import torchax.export  # noqa: F401
    finally:
        for packet, name in stand_ins:
            delattr(packet, name)


def _setup_error(doing: str, found: str) -> SetupError:
    return SetupError(
        doing,
        found=found,
        expected="torchax, and JAX, that go with this torch",
        fix="pip install 'modelpress[xla]' in an environment of its own, with a torch that torchax knows "
        "(docs/processors.md)",
    )


def _traced(module: nn.Module, workload: Workload, doing: str) -> torch.export.ExportedProgram:
    example = workload.example(EXAMPLE_BATCH)
    run_torch(module, example)
    axes = workload.dynamic_axes()
    shapes = {name: dict.fromkeys(axes.get(name, {}), torch.export.Dim.DYNAMIC) for name in example}
    try:
        return torch.export.export(module, (), kwargs=example, dynamic_shapes=shapes)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:  # torch's own are RuntimeErrors
        raise ExportError(
            doing,
            found=_first_line(error),
            expected="a forward that torch.export can trace",
            fix="rewrite it without branches on tensor values, .item() and custom operators",
        ) from error


def _lowered(program: torch.export.ExportedProgram, workload: Workload, doing: str) -> _Lowered:
    import jax
    import jax.export
    import torchax
    import torchax.export

    example = workload.example(EXAMPLE_BATCH)
    try:
        names, tensors, function = torchax.export.exported_program_to_jax(program, export_raw=True)
        # Constants that the tracer made come behind the parameters and buffers, without names.
        names = [*names, *(f"constant.{number}" for number in range(len(tensors) - len(names)))]
        arrays = torchax.default_env().t2j_copy([tensor.detach() for tensor in tensors])
        weights = dict(zip(names, arrays, strict=True))

        def call(weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> Any:
            return function([weights[name] for name in names], tuple(inputs[name] for name in example))[0]

        shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in weights.items()}
        # Without it a TPU would round the factors of float32 products to bfloat16.
        with jax.default_matmul_precision("highest"):
            exported = jax.export.export(jax.jit(call), platforms=PLATFORMS)(shapes, _signature(program, workload))
        return _Lowered(bytes(exported.serialize()), weights)
    # torchax asserts that it knows an operator; JAX's errors are of all these kinds.
    except (RuntimeError, ValueError, TypeError, AssertionError, KeyError, NotImplementedError) as error:
        raise ExportError(
            doing,
            found=_first_line(error),
            expected="operators that torchax has, and shapes that JAX can follow",
            fix="another form of that operator; or leave an axis out of the workload's dynamic_axes()",
        ) from error


def _signature(program: torch.export.ExportedProgram, workload: Workload) -> dict[str, Any]:
    """Shapes and types of the inputs; JAX has no integers of 64 bits, nor do TPUs."""
    import jax
    import jax.export
    from torchax.ops import mappings

    axes, example = workload.dynamic_axes(), workload.example(EXAMPLE_BATCH)
    labels = sorted({label for by_axis in axes.values() for label in by_axis.values()})
    symbols = {label: f"n{number}" for number, label in enumerate(labels)}
    most = _most(program, axes, list(example))
    scope = jax.export.SymbolicScope([f"{symbols[label]} <= {size}" for label, size in most.items()])
    sizes = {label: jax.export.symbolic_shape(symbol, scope=scope)[0] for label, symbol in symbols.items()}
    found = {}
    for name, tensor in example.items():
        varies = axes.get(name, {})
        shape = [sizes[varies[axis]] if axis in varies else size for axis, size in enumerate(tensor.shape)]
        dtype = jax.dtypes.canonicalize_dtype(mappings.t2j_dtype(tensor.dtype))
        found[name] = jax.ShapeDtypeStruct(shape, dtype)
    return found


def _most(
    program: torch.export.ExportedProgram, axes: Mapping[str, Mapping[int, str]], names: Sequence[str]
) -> dict[str, int]:
    """The largest size of an axis that the tracer found (as many positions as a table has), where it found one."""
    given = [spec.kind == InputKind.USER_INPUT for spec in program.graph_signature.input_specs]
    places = [node for node in program.graph.nodes if node.op == "placeholder"]
    found: dict[str, int] = {}
    for name, place in zip(names, itertools.compress(places, given), strict=True):
        for axis, label in axes.get(name, {}).items():
            size = place.meta["val"].shape[axis]
            bounds = program.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
            if bounds is not None and bounds.upper.is_Integer and bounds.upper < LARGEST:
                found[label] = min(int(bounds.upper), found.get(label, LARGEST))
    return found


def _largest_difference(
    module: nn.Module, lowered: _Lowered, workload: Workload, tolerance: float, doing: str
) -> float:
    """Between the module and the program, read back and compiled here, on inputs of several sizes."""
    import jax
    import jax.export

    program = jax.export.deserialize(bytearray(lowered.program))
    call = jax.jit(program.call)
    types = dict(zip(sorted(workload.example(1)), _input_types(program, lowered), strict=True))
    largest = 0.0
    for description, inputs in check_inputs(workload):
        expected = run_torch(module, inputs).numpy()
        given = {name: tensor.numpy().astype(types[name]) for name, tensor in inputs.items()}
        found = np.asarray(call(lowered.weights, given))
        difference = float("inf")
        if found.shape == expected.shape:
            difference = float(np.abs(found.astype(np.float64) - expected).max(initial=0.0))
        if not difference <= tolerance:
            raise ExportError(
                f"{doing}, comparing it with the module on {description}",
                found=f"an output of shape {list(found.shape)} that differs by up to {difference:.3g}",
                expected=f"shape {list(expected.shape)}, and at most export.tolerance, {tolerance:.3g}",
                fix="raise export.tolerance if the difference is rounding; otherwise look for code that depends on "
                "the values or the shape of its input",
            )
        largest = max(largest, difference)
    return largest


def _input_types(program: Any, lowered: _Lowered) -> list[Any]:
    """Element types of the inputs, in the order of their names: JAX flattens dictionaries in that order."""
    return [one.dtype for one in program.in_avals[len(lowered.weights) :]]


def _backend() -> str:
    import jax

    return str(jax.default_backend())


def _write(folder: Path, lowered: _Lowered, report: StableHloReport, doing: str) -> None:
    """All files, or none."""
    import safetensors.flax

    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    with local_errors(doing, writing=True):
        try:
            partial.mkdir(parents=True)
            (partial / PROGRAM_FILE).write_bytes(lowered.program)
            safetensors.flax.save_file(dict(lowered.weights), partial / WEIGHTS_FILE)
            # safetensors lets the owner alone read its files.
            (partial / WEIGHTS_FILE).chmod((partial / PROGRAM_FILE).stat().st_mode)
            (partial / REPORT_FILE).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:500]
