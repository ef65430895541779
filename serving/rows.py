"""Whether the rows of several requests may go through a model together: does each row's answer stay its own?

By the graph first: some operators look at the whole batch (a dynamic int8 product takes its range from all rows), and
some draw lots. Then by trial at the load: rows that differ are answered together and alone, and must agree as closely
as one float kernel agrees with another. What can't be shown is not joined.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from serving.tensors import DATATYPES, TensorSpec

TRIAL_ROWS = 4
TRIAL_LENGTH = 8
"""Size of free axes in the trial: long enough for rows of small integers to differ."""
MAX_TRIAL_BYTES = 2**26
SCALES = (1.0, 0.25, 4.0, 0.5)
"""One per row: a range that is taken over all rows shows at once."""
TOLERANCES = {"FP16": 2e-3, "FP32": 2e-5, "FP64": 1e-10}
"""Largest difference of an answer, relative to the largest number in it. Matrix products of one row and of several use
different kernels, which add in another order."""

WHOLE_BATCH = {
    "DynamicQuantizeLinear": "takes the range of its activations from all rows",
    "DynamicQuantizeMatMul": "takes the range of its activations from all rows",
    "DynamicQuantizeLSTM": "takes the range of its activations from all rows",
    "RandomNormal": "draws lots",
    "RandomNormalLike": "draws lots",
    "RandomUniform": "draws lots",
    "RandomUniformLike": "draws lots",
    "Multinomial": "draws lots",
    "Bernoulli": "draws lots",
}
"""Operators that a row's answer can't be its own with, and why."""

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Rows:
    """What was found out."""

    joined: bool
    """Whether requests may be joined."""
    reason: str
    """Why not; or how close the answers were."""
    seconds: float = 0.0
    """Of one row alone, measured once; 0 where nothing was tried."""

    def to_json(self) -> dict[str, Any]:
        """For the metadata."""
        return {"joined": self.joined, "reason": self.reason}


UNTRIED = Rows(False, "not tried")


def examine(
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    operators: Collection[str],
    answer: Callable[[Arrays], Arrays | None],
    known: Mapping[str, np.ndarray],
) -> Rows:
    """Find out whether a model's requests may be joined.

    Args:
        inputs: what the model takes.
        outputs: what it gives.
        operators: names of all operators in its graph.
        answer: runs it; None where it can't run on these values.
        known: inputs that it runs on, for the sizes of axes that differ per call.
    """
    for name in sorted(set(operators) & set(WHOLE_BATCH)):
        return Rows(False, f"the graph has {name}, which {WHOLE_BATCH[name]}")
    problem = _shapes(inputs, outputs)
    if problem:
        return Rows(False, problem)
    for length in (TRIAL_LENGTH, None):
        rows = _trial(inputs, known, length)
        if rows is None:
            return Rows(False, f"a trial would take more than {MAX_TRIAL_BYTES} bytes")
        together = answer(rows)
        if together is not None:
            return _compare(outputs, together, rows, answer)
    return Rows(False, "it does not run on the rows of the trial")


def _shapes(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> str | None:
    """What about the shapes keeps rows apart; None: nothing."""
    names = {spec.shape[0] if spec.shape else 1 for spec in (*inputs, *outputs)}
    fixed = [spec.name for spec in (*inputs, *outputs) if not spec.shape or isinstance(spec.shape[0], int)]
    if fixed:
        return f"the first axis of {fixed[0]!r} has one size"
    inner = [(spec.name, axis) for spec in (*inputs, *outputs) for axis in spec.shape[1:] if isinstance(axis, str)]
    again = [name for name, axis in inner if axis in names]
    if again:
        return f"an axis of {again[0]!r} has the size of the batch"
    if len({spec.shape[0] for spec in inputs}) > 1:
        return "the first axes of its inputs may differ"
    return None


def _trial(inputs: Sequence[TensorSpec], known: Mapping[str, np.ndarray], length: int | None) -> Arrays | None:
    """Rows that differ from each other; None where they would be too large."""
    generator = np.random.default_rng(0)
    shapes = {}
    for spec in inputs:
        sizes = zip(spec.shape[1:], known[spec.name].shape[1:], strict=True)
        shapes[spec.name] = [TRIAL_ROWS, *(axis if isinstance(axis, int) else length or size for axis, size in sizes)]
    if sum(np.prod(shapes[spec.name], dtype=float) * 8 for spec in inputs) > MAX_TRIAL_BYTES:
        return None
    made = {}
    for spec in inputs:
        shape, dtype = shapes[spec.name], DATATYPES[spec.datatype]
        if dtype.kind == "f":
            scales = np.array(SCALES).reshape([TRIAL_ROWS] + [1] * (len(shape) - 1))
            made[spec.name] = (generator.normal(size=shape) * scales).astype(dtype)
        else:
            # Zeros and ones are legal as ids, as masks and as pixels; a mask of zeros alone may not be.
            array = generator.integers(0, 2, shape)
            array.reshape(TRIAL_ROWS, -1)[:, 0] = 1
            made[spec.name] = array.astype(dtype)
    return made


def _compare(
    outputs: Sequence[TensorSpec], together: Arrays, rows: Arrays, answer: Callable[[Arrays], Arrays | None]
) -> Rows:
    """Each row alone, against what it got in company."""
    worst, seconds = 0.0, 0.0
    for spec in outputs:
        if together[spec.name].shape[:1] != (TRIAL_ROWS,):
            return Rows(False, f"output {spec.name!r} has another number of rows than the inputs")
    for row in range(TRIAL_ROWS):
        started = time.perf_counter()
        alone = answer({name: array[row : row + 1] for name, array in rows.items()})
        seconds = time.perf_counter() - started
        if alone is None:
            return Rows(False, "it does not run on one row alone")
        for spec in outputs:
            off = _difference(together[spec.name][row : row + 1], alone[spec.name])
            if not off <= TOLERANCES.get(spec.datatype, 0.0):
                return Rows(False, f"in company a row's {spec.name!r} differs by {off:.1e} of its scale", seconds)
            worst = max(worst, off)
    return Rows(True, f"in company answers differ by at most {worst:.1e} of their scale", seconds)


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference, relative to the largest number; NaN and infinity, which show nothing, are infinitely off."""
    if one.shape != other.shape:
        return np.inf
    if one.dtype.kind != "f":
        return 0.0 if np.array_equal(one, other) else np.inf
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return np.inf
    off = float(np.abs(one.astype(np.float64) - other).max(initial=0.0))
    scale = float(np.abs(other).max(initial=0.0))
    return off / scale if scale else (np.inf if off else 0.0)
