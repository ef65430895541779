"""How much each layer suffers from quantization, and how many must stay in float."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from onnx import ModelProto
from torch import Tensor

from modelpress import graph

Build = Callable[[Sequence[str], Sequence[str]], ModelProto]
"""Makes the model in which the first named nodes compute in integers, the second ones in float from stored integers,
and all others are as they were."""

MAX_HELD_BYTES = 2**28
"""Of the float model's outputs; a language model's logits may be many times that."""

Unit = tuple[str, ...]
"""Names of nodes that share one weight: all in integers, or all in float."""


class Judge:
    """Compares models with the float model, on fixed inputs.

    Args:
        reference: the float model.
        batches: named inputs.
    """

    def __init__(self, reference: ModelProto, batches: Sequence[dict[str, Tensor]]) -> None:
        self._batches = batches
        self._reference = graph.session(graph.split(reference))
        self._held: list[np.ndarray] = []
        """The float model's outputs on the first batches; on the others it runs anew each time."""
        size = 0
        for batch in batches:
            rows = _rows(graph.run(self._reference, batch))
            size += rows.nbytes
            if size > MAX_HELD_BYTES:
                break
            self._held.append(rows)

    def disagreement(self, model: ModelProto) -> float:
        """1 − mean cosine between the outputs of `model` and the float model's, one per sample."""
        session = graph.session(graph.split(model))
        total, samples = 0.0, 0
        for index, batch in enumerate(self._batches):
            found = _rows(graph.run(session, batch))
            held = index < len(self._held)
            expected = self._held[index] if held else _rows(graph.run(self._reference, batch))
            total, samples = total + mean_cosine(found, expected) * len(found), samples + len(found)
        return 1.0 - total / samples


def mean_cosine(found: np.ndarray, expected: np.ndarray) -> float:
    """Mean over the rows of the cosine between two (samples, features) matrices; two zero rows agree, a zero row and
    another do not."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)  # of one batch
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    products = np.sum(found * expected, axis=1)
    both_zero = ~found.any(axis=1) & ~expected.any(axis=1)
    cosines = np.where(norms > 0, products / np.where(norms > 0, norms, 1.0), both_zero)
    return float(np.clip(cosines, -1.0, 1.0).mean())


def rank(
    build: Build, units: Sequence[Unit], judge: Judge, note: Callable[[int, str], None]
) -> list[tuple[Unit, float]]:
    """Disagreement with each unit alone in integers, the most sensitive first."""
    rows = []
    for done, unit in enumerate(units, start=1):
        note(done, ", ".join(unit))
        rows.append((unit, judge.disagreement(build(unit, []))))
    return sorted(rows, key=lambda row: (-row[1], row[0]))


def keep_in_float(
    build: Build, ranked: Sequence[Unit], judge: Judge, budget: float, note: Callable[[int, float], None]
) -> tuple[int, ModelProto, float]:
    """Least number of the most sensitive units to leave in float so that the disagreement is within `budget`.

    Found by bisection: the disagreement falls, but for noise, as more units stay in float.

    Args:
        build: makes the models.
        ranked: units, the most sensitive first.
        judge: measures the disagreement.
        budget: largest disagreement allowed.
        note: told the number of units in float and the disagreement, after each try.

    Returns:
        The number, the model and its disagreement. The number is that of all units where no other fits.
    """
    tried: dict[int, tuple[ModelProto, float]] = {}

    def measure(kept: int) -> float:
        model = build(_nodes(ranked[kept:]), _nodes(ranked[:kept]))
        tried[kept] = (model, judge.disagreement(model))
        note(kept, tried[kept][1])
        return tried[kept][1]

    if measure(0) <= budget:
        return 0, *tried[0]
    too_few, enough = 0, len(ranked)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if measure(middle) <= budget:
            enough = middle
        else:
            too_few = middle
            del tried[middle]
    if enough not in tried:
        measure(enough)
    return enough, *tried[enough]


def _nodes(units: Sequence[Unit]) -> list[str]:
    return [node for unit in units for node in unit]


def _rows(output: np.ndarray) -> np.ndarray:
    return output.reshape(output.shape[0], -1)
