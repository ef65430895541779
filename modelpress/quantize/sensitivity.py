"""How much each layer suffers from quantization, and how many must stay in float."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnx import ModelProto

from modelpress import graph
from modelpress.agreement import Judge

Build = Callable[[Sequence[str], Sequence[str]], ModelProto]
"""Makes the model in which the first named nodes compute in integers, the second ones in float from stored integers,
and all others are as they were."""

Unit = tuple[str, ...]
"""Names of nodes that share one weight: all in integers, or all in float."""


def rank(
    build: Build, units: Sequence[Unit], judge: Judge, note: Callable[[int, str], None]
) -> list[tuple[Unit, float]]:
    """Disagreement with each unit alone in integers, the most sensitive first."""
    rows = []
    for done, unit in enumerate(units, start=1):
        note(done, ", ".join(unit))
        rows.append((unit, judge.disagreement(graph.split(build(unit, [])))))
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
        tried[kept] = (model, judge.disagreement(graph.split(model)))
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
