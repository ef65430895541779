"""The inputs and outputs of a pack's graph: what MLflow's signature says of them, and the check of what is given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime

from modelpress.errors import WorkloadError

DTYPES: dict[str, np.dtype[Any]] = {
    "bool": np.dtype(np.bool_),
    "float": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "double": np.dtype(np.float64),
    **{f"{sign}int{bits}": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
}
"""By ONNX's names of them; what MLflow can describe and hand over."""
EXAMPLE_SIZE = 32
"""Of the axes of an example that may differ per call, but the first: some models need more than one pixel."""


@dataclass(frozen=True)
class Tensor:
    """An input or an output."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]
    """Text for an axis that may differ per call: its name in the graph, or nothing."""

    def __str__(self) -> str:
        return f"{self.name} ({self.dtype}, [{', '.join(str(size or '?') for size in self.shape)}])"

    def example(self) -> np.ndarray:
        """Ones of this shape, for one sample."""
        sizes = [size if isinstance(size, int) else EXAMPLE_SIZE if axis else 1 for axis, size in enumerate(self.shape)]
        return np.ones(sizes, self.dtype)


def of_graph(model: onnx.ModelProto) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs of a graph, which needs no weights for it.

    Raises:
        WorkloadError: one is of a type that `DTYPES` lacks.
    """
    weights = {one.name for one in model.graph.initializer}
    inputs = [_of_value(one) for one in model.graph.input if one.name not in weights]
    return inputs, [_of_value(one) for one in model.graph.output]


def of_session(session: onnxruntime.InferenceSession) -> list[Tensor]:
    """Inputs of a session.

    Raises:
        WorkloadError: one is of a type that `DTYPES` lacks.
    """
    return [
        Tensor(
            one.name,
            _dtype(one.name, one.type.removeprefix("tensor(").removesuffix(")")),
            tuple(size if isinstance(size, int) else size or "" for size in one.shape),
        )
        for one in session.get_inputs()
    ]


def check(expected: Sequence[Tensor], given: object) -> dict[str, np.ndarray]:
    """The inputs by name, if they are what a graph takes; nothing is converted.

    Args:
        expected: the graph's inputs.
        given: arrays by name.

    Raises:
        WorkloadError: a name, a type or a shape is another one, or inputs that share an axis differ in it.
    """
    if not isinstance(given, Mapping):
        raise _refused(f"{type(given).__name__}", expected)
    if set(given) != {one.name for one in expected}:
        raise _refused(f"inputs {', '.join(sorted(map(str, given))) or '(none)'}", expected)
    shared: dict[str, tuple[int, str]] = {}
    for one in expected:
        array = given[one.name]
        if not isinstance(array, np.ndarray):
            raise _refused(f"{type(array).__name__} for {one.name}", [one])
        fixed = len(array.shape) == len(one.shape) and all(
            size == found for size, found in zip(one.shape, array.shape, strict=True) if isinstance(size, int)
        )
        if array.dtype != one.dtype or not fixed:
            raise _refused(f"{one.name} ({array.dtype}, {list(array.shape)})", [one])
        for size, found in zip(one.shape, array.shape, strict=True):
            if not isinstance(size, str) or not size:
                continue
            first, name = shared.setdefault(size, (found, one.name))
            if first != found:
                raise _refused(f"axis {size!r} of {first} in {name}, of {found} in {one.name}", expected)
    return dict(given)


def _of_value(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    shape = tuple(axis.dim_value if axis.HasField("dim_value") else axis.dim_param for axis in kind.shape.dim)
    return Tensor(value.name, _dtype(value.name, onnx.TensorProto.DataType.Name(kind.elem_type).lower()), shape)


def _dtype(name: str, text: str) -> np.dtype[Any]:
    found = DTYPES.get(text)
    if found is None:
        raise WorkloadError(
            f"describing {name!r} of a graph to MLflow",
            found=f"elements of type {text}",
            expected=", ".join(DTYPES),
            fix="end the graph in one of these (float32 as a rule) in Workload.source",
        )
    return found


def _refused(found: str, expected: Iterable[Tensor]) -> WorkloadError:
    return WorkloadError("reading the inputs", found=found, expected=", ".join(map(str, expected)))
