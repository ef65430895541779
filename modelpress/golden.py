"""Golden samples: a few inputs, and what the published graph answered to them, kept in the pack.

Whoever loads the pack asks the same again and compares, before anything else is asked: digests prove that the bytes are
those that were judged, and this proves that the machine computes with them what the publisher's did. The file's layout
is part of docs/format.md; why the tolerances are what they are, docs/decisions/0034-loading.md.

The answers are those of ONNX Runtime's CPU provider with one thread, rounded to `ANSWER_BITS`: the same machine and
ONNX Runtime always give the same bytes, so that the same work is the same pack.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Final, Literal

import numpy as np
import safetensors
import safetensors.numpy
from onnx import ModelProto, TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state as native
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelpress import graph
from modelpress.checkpoint import Checkpoint
from modelpress.errors import CorruptionError, SelfTestError, WorkloadError
from modelpress.manifest import check_version

GOLDEN_FILE: Final = "golden.safetensors"
"""Name of the file in a pack."""
FORMAT_VERSION: Final = 1
MAX_FILE_BYTES: Final = 16 * 2**20
"""A larger file is refused before it is read."""
MAX_INPUT_BYTES: Final = 2**20
"""Inputs of more bytes are published with fewer samples, or with none."""
MAX_ANSWERS: Final = 2**15
"""Values of one output that are kept: of larger outputs every so many-th."""
MAX_TOLERANCE: Final = 0.25
"""A file that would let more pass is refused."""
ANSWER_BITS: Final = 12
"""Significant bits of a stored answer; the rounding is an eighth of the least tolerance."""

Precision = Literal["float", "half", "static", "dynamic"]
TOLERANCES: Final[dict[Precision, float]] = {"float": 1e-3, "half": 1e-2, "static": 7.5e-2, "dynamic": 5e-2}
"""Largest difference of an answer, as a share of the largest answer of its output, by how the graph computes."""

_DYNAMIC = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "DynamicQuantizeLSTM"}
_HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_FAILURES = (
    *graph.LOST_DEVICE, native.Fail, native.InvalidArgument, native.NotImplemented, native.RuntimeException,
)  # fmt: skip


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[Annotated[int, Field(ge=0, lt=2**40)], ...] = Field(max_length=64)
    stride: int = Field(ge=1, lt=2**40)


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1]
    precision: Precision
    tolerance: float = Field(gt=0, le=MAX_TOLERANCE, allow_inf_nan=False)
    classes: bool
    answers: dict[str, _Answer] = Field(min_length=1)


@dataclass(frozen=True)
class Golden:
    """Inputs by name, as the graph takes them, and the answers to them."""

    inputs: dict[str, np.ndarray]
    answers: dict[str, np.ndarray]
    """By output: flat, every `strides[name]`-th value of the answer in row-major order."""
    shapes: dict[str, tuple[int, ...]]
    """Of the whole answers."""
    strides: dict[str, int]
    precision: Precision
    """How the graph computes: in float, in 16 bits, or in 8 with fixed or with measured ranges of activations."""
    tolerance: float
    """Largest difference of an answer, as a share of the largest answer of its output."""
    classes: bool = False
    """Whether the answers are scores of classes, whose greatest must stay the greatest."""

    @property
    def samples(self) -> int:
        """Rows of the inputs."""
        return max((len(array) for array in self.inputs.values() if array.ndim), default=1)

    def to_bytes(self) -> bytes:
        """As a safetensors file, deterministically: `input:NAME` and `answer:NAME`."""
        facts = {
            "format_version": FORMAT_VERSION,
            "precision": self.precision,
            "tolerance": self.tolerance,
            "classes": self.classes,
            "answers": {
                name: {"shape": self.shapes[name], "stride": self.strides[name]} for name in sorted(self.answers)
            },
        }
        tensors = {f"input:{name}": np.ascontiguousarray(array) for name, array in self.inputs.items()}
        tensors |= {f"answer:{name}": np.ascontiguousarray(array) for name, array in self.answers.items()}
        # One key: safetensors writes several in an order that changes from call to call.
        return bytes(safetensors.numpy.save(tensors, {"golden": json.dumps(facts, sort_keys=True)}))


@dataclass(frozen=True)
class Outcome:
    """How the answers of a loaded graph compare with the golden ones."""

    difference: float
    """The largest, as a share of the largest golden answer of its output."""
    tolerance: float
    samples: int
    agreement: float | None
    """Share of the samples whose greatest class is the same; None where the answers are no classes."""


def make(checkpoint: Checkpoint, inputs: Mapping[str, np.ndarray], *, classes: bool) -> Golden | None:
    """Ask a graph, and keep its answers.

    Args:
        checkpoint: of kind `onnx`.
        inputs: by name, samples first, in the types of the graph; what the graph does not have is left out. As many
            samples are kept as fit `MAX_INPUT_BYTES`.
        classes: whether the answers are scores of classes.

    Returns:
        The samples; None where not even one fits.

    Raises:
        WorkloadError: the graph does not run on the inputs, or answers with NaN, infinity or text.
    """
    doing = "asking the graph for golden answers"
    fix = "publish real samples (upload.golden_inputs: calibration), or none (upload.golden_samples: 0)"
    session = graph.session(checkpoint, threads=1)
    names = [one.name for one in session.get_inputs()]
    missing = sorted(set(names) - set(inputs))
    if missing:
        raise WorkloadError(doing, found=f"inputs {sorted(inputs)}", expected=f"also {missing}", fix=fix)
    rows = min(len(inputs[name]) for name in names)
    each = sum(inputs[name].nbytes / max(len(inputs[name]), 1) for name in names)
    rows = min(rows, int(MAX_INPUT_BYTES / max(each, 1.0)))
    if rows < 1:
        return None
    asked = {name: np.ascontiguousarray(inputs[name][:rows]) for name in names}
    try:
        found = dict(zip([one.name for one in session.get_outputs()], session.run(None, asked), strict=True))
    except _FAILURES as error:
        raise WorkloadError(doing, found=str(error)[:500], expected="an answer", fix=fix) from error
    for name, answer in found.items():
        if not isinstance(answer, np.ndarray) or answer.dtype.kind not in "fiub":
            raise WorkloadError(doing, found=f"output {name!r} of another kind", expected="numbers", fix=fix)
        if answer.dtype.kind == "f" and not np.isfinite(answer).all():
            raise WorkloadError(doing, found=f"NaN or infinity in output {name!r}", expected="numbers", fix=fix)
    # Odd, so that along an even number of columns not always the same ones are kept.
    strides = {name: max(1, math.ceil(answer.size / MAX_ANSWERS)) | 1 for name, answer in found.items()}
    precision = precision_of(graph.parse(checkpoint))
    return Golden(
        inputs=asked,
        answers={name: _rounded(answer.reshape(-1)[:: strides[name]]) for name, answer in found.items()},
        shapes={name: answer.shape for name, answer in found.items()},
        strides=strides,
        precision=precision,
        tolerance=TOLERANCES[precision],
        classes=classes,
    )


def read(data: bytes) -> Golden:
    """Read what `Golden.to_bytes` wrote.

    Raises:
        CorruptionError: not such a file.
        UnsupportedFormatError: written by a newer modelpress.
    """
    doing = f"reading {GOLDEN_FILE}"
    if len(data) > MAX_FILE_BYTES:
        raise CorruptionError(doing, found=f"{len(data)} bytes", expected=f"at most {MAX_FILE_BYTES}")
    try:
        # First safetensors' own reader, which checks lengths and nesting before anything is parsed here.
        tensors = safetensors.numpy.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        document = json.loads(header["__metadata__"]["golden"])
        check_version(document["format_version"], doing, FORMAT_VERSION)
        facts = _Facts.model_validate(document)
    except ValidationError as error:
        raise CorruptionError(doing, found=str(error.errors(include_url=False)[0])[:300]) from error
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CorruptionError(
            doing, found=f"{type(error).__name__}: {error}"[:300], expected="golden samples"
        ) from error
    inputs = {name.removeprefix("input:"): array for name, array in tensors.items() if name.startswith("input:")}
    answers = {name.removeprefix("answer:"): array for name, array in tensors.items() if name.startswith("answer:")}
    if not inputs or set(answers) != set(facts.answers) or len(inputs) + len(answers) != len(tensors):
        raise CorruptionError(doing, found=f"tensors {sorted(tensors)}"[:300], expected="inputs and answers by name")
    for name, answer in answers.items():
        told = facts.answers[name]
        size = -(-math.prod(told.shape) // told.stride)
        if answer.shape != (size,) or answer.dtype.kind not in "fiub" or not np.isfinite(answer).all():
            raise CorruptionError(
                doing, found=f"answer {name!r}: {answer.dtype} {answer.shape}", expected=f"{size} finite numbers"
            )
    return Golden(
        inputs=inputs,
        answers=answers,
        shapes={name: one.shape for name, one in facts.answers.items()},
        strides={name: one.stride for name, one in facts.answers.items()},
        precision=facts.precision,
        tolerance=facts.tolerance,
        classes=facts.classes,
    )


def check(golden: Golden, found: Mapping[str, np.ndarray], doing: str) -> Outcome:
    """Compare the whole answers of a loaded graph with the golden ones.

    Floats may differ by `golden.tolerance` of the largest golden answer of their output, integers not at all. Where the
    answers are classes, the greatest of a sample must stay the greatest wherever its lead is above what the tolerance
    explains: one output of a huge constant would otherwise hide all others.

    Raises:
        SelfTestError: they differ by more; the output and both numbers are named.
    """
    worst, agreements = 0.0, list[float]()
    for name, answer in golden.answers.items():
        given = found.get(name)
        kind, shape = "numbers" if answer.dtype.kind == "f" else str(answer.dtype), golden.shapes[name]
        if given is None or given.shape != shape or (given.dtype.kind == "f") != (answer.dtype.kind == "f"):
            what = "nothing" if given is None else f"{given.dtype} of shape {list(given.shape)}"
            expected = f"{kind} of shape {list(shape)}"
            raise SelfTestError(f"{doing}: output {name!r}", found=what, expected=expected, fix=FIX)
        difference = _difference(answer, given.reshape(-1)[:: golden.strides[name]])
        allowed = golden.tolerance if answer.dtype.kind == "f" else 0.0
        if not difference <= allowed:  # so that NaN fails
            raise SelfTestError(
                f"{doing}: output {name!r}",
                found=f"answers that differ by {difference:.3g} of the largest",
                expected=f"at most {allowed:.3g} ({golden.precision})",
                fix=FIX,
            )
        worst = max(worst, difference)
        if golden.classes and len(shape) == 2 and golden.strides[name] == 1:
            agreements.append(_agreement(answer.reshape(given.shape), given, golden.tolerance, f"{doing}: {name!r}"))
    return Outcome(worst, golden.tolerance, golden.samples, min(agreements) if agreements else None)


FIX = (
    "this machine, or its ONNX Runtime, computes otherwise than the publisher's: compare versions and execution "
    "providers; where that is meant, publish with upload.golden_samples 0"
)


def precision_of(model: ModelProto) -> Precision:
    """How a graph computes, by its operators: what is only stored in few bits and computed in float is `float`."""
    nodes = [node for one in graph.graphs(model) for node in one.node]
    kinds = {node.op_type for node in nodes}
    levels = {
        helper.get_attribute_value(attribute)
        for node in nodes
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    }
    if kinds & _DYNAMIC or 4 in levels:  # level 4: activations become int8 as they come
        return "dynamic"
    if "QuantizeLinear" in kinds:
        return "static"
    casts = {
        attribute.i
        for node in nodes
        if node.op_type == "Cast"
        for attribute in node.attribute
        if attribute.name == "to"
    }
    fed = {one.type.tensor_type.elem_type for one in model.graph.input}
    return "half" if (casts | fed) & set(_HALF) else "float"


def _rounded(values: np.ndarray) -> np.ndarray:
    """Floats as float32 of `ANSWER_BITS` significant bits; other numbers as they are."""
    if values.dtype.kind != "f":
        return values.copy()
    mantissa, exponent = np.frexp(values.astype(np.float64))
    return np.ldexp(np.round(mantissa * 2**ANSWER_BITS) / 2**ANSWER_BITS, exponent).astype(np.float32)


def _difference(answer: np.ndarray, given: np.ndarray) -> float:
    """The largest, as a share of the largest answer; of integers and booleans, whether there is one."""
    if not answer.size:
        return 0.0
    if answer.dtype.kind != "f":
        return float(not np.array_equal(answer, given))
    expected, found = answer.astype(np.float64), given.astype(np.float64)
    scale = float(np.abs(expected).max()) or 1.0
    return float(np.abs(expected - found).max() / scale)


def _agreement(answer: np.ndarray, given: np.ndarray, tolerance: float, doing: str) -> float:
    """Share of the rows whose greatest value stands in the same place.

    A row's lead is held against the size of its own two greatest values, and of those of the other rows.

    Raises:
        SelfTestError: a row whose lead is clear has another one.
    """
    rows, columns = answer.shape
    if rows < 2 or columns < 2:
        return float((answer.argmax(1) == given.argmax(1)).mean()) if answer.size else 1.0
    ordered = np.sort(answer.astype(np.float64), axis=1)
    lead, size = ordered[:, -1] - ordered[:, -2], np.abs(ordered[:, -2:]).sum(axis=1)
    clear = lead > 2 * tolerance * np.maximum(size, np.median(size))
    same = answer.argmax(axis=1) == given.argmax(axis=1)
    if not same[clear].all():
        raise SelfTestError(
            doing,
            found=f"another class for {int((~same[clear]).sum())} of {rows} samples",
            expected="the same class where it leads clearly",
            fix=FIX,
        )
    return float(same.mean())
