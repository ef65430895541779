"""Bytes and disagreement of every candidate of a weight, with that weight alone changed.

For small changes of a weight the divergence is quadratic in them: it is in proportion to their mean square, each
weighed by its input's. So the candidates of a scale are measured from the coarsest on, until two steps in a row have
gone as that law says; the finer ones, where it holds all the better, follow from the last measurement. Candidates with
zeros of their own are foretold from the same codes without, and only those are measured that could save bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modelpress.config import CompressConfig
from modelpress.plan.candidates import Candidate, Coding
from modelpress.plan.costs import Cost, coding_cost
from modelpress.plan.fed import FedWeights
from modelpress.plan.solver import Option, hull
from modelpress.plan.tensors import PlannedWeight

LAW_TOLERANCE = 1.25
"""The law is held to go on where measured ÷ foretold lies within this factor of 1."""
AGREEING_STEPS = 2
NEGLIGIBLE = 1e-12
"""A disagreement below is the noise of float32 sums, and says nothing about a law."""
HOPE = 2.0
"""How many times less than foretold a candidate with zeros may disagree; what saves no bytes even so is left out."""


@dataclass(frozen=True)
class Measured:
    """A candidate of a weight."""

    candidate: Candidate
    cost: Cost
    error: float
    """Mean square of what was changed, each weight's by its input's mean square where that is known."""
    disagreement: float
    """With this weight alone changed."""
    is_measured: bool
    """Or foretold by the law."""


def least_measurements(weight: PlannedWeight) -> int:
    """How many measurements a weight takes where the law holds from the coarsest candidate on, and zeros save
    nothing."""
    scales = [one.scale for one in weight.candidates if not one.sparsity]
    each = enumerate(dict.fromkeys(scales))
    return sum(min(scales.count(scale), AGREEING_STEPS + (place == 0)) for place, scale in each)


def measure(weight: PlannedWeight, judge: FedWeights, compression: CompressConfig | None) -> list[Measured]:
    """Every candidate of a weight, in the order of `weight.candidates`."""
    dense: dict[Candidate, Measured] = {}
    for scale in dict.fromkeys(one.scale for one in weight.candidates):
        rising = sorted(
            (one for one in weight.candidates if one.scale == scale and not one.sparsity), key=lambda one: one.num_bits
        )
        dense |= {one.candidate: one for one in _curve(weight, rising, list(dense.values()), judge, compression)}
    every = dense | _sparse(weight, dense, judge, compression)
    return [every[one] for one in weight.candidates]


def _curve(
    weight: PlannedWeight,
    rising: Sequence[Candidate],
    known: Sequence[Measured],
    judge: FedWeights,
    compression: CompressConfig | None,
) -> list[Measured]:
    """The candidates of one scale, by rising bits; the first is foretold from that of another scale that is nearest."""
    curve: list[Measured] = []
    agreeing = 0
    for candidate in rising:
        coding = weight.encode(candidate)
        error = _error(weight, coding)
        foretold = _foretold(curve[-1] if curve else _nearest(known, error), error)
        is_measured = agreeing < AGREEING_STEPS or foretold is None
        disagreement = foretold
        if is_measured or disagreement is None:
            disagreement = judge.disagreement({weight.name: coding.dequantize()})
            agreeing = agreeing + 1 if foretold is not None and _agree(disagreement, foretold) else 0
        curve.append(Measured(candidate, coding_cost(weight, coding, compression), error, disagreement, is_measured))
    return curve


def _sparse(
    weight: PlannedWeight, dense: dict[Candidate, Measured], judge: FedWeights, compression: CompressConfig | None
) -> dict[Candidate, Measured]:
    """The candidates with zeros; those are measured that would lie on the lower hull of bytes against disagreement if
    they disagreed `HOPE` times less than is foretold."""
    known = [Option(one.cost.bytes, one.disagreement) for one in dense.values()]
    found: dict[Candidate, Measured] = {}
    for candidate in (one for one in weight.candidates if one.sparsity):
        without = dense[candidate.dense]
        coding = weight.encode(candidate)
        error = _error(weight, coding)
        cost = coding_cost(weight, coding, compression)
        foretold = _foretold(without, error) or 0.0
        is_measured = on_hull(Option(cost.bytes, foretold / HOPE), known)
        disagreement = judge.disagreement({weight.name: coding.dequantize()}) if is_measured else foretold
        found[candidate] = Measured(candidate, cost, error, disagreement, is_measured)
        if is_measured:
            known.append(Option(cost.bytes, disagreement))
    return found


def _nearest(some: Sequence[Measured], error: float) -> Measured | None:
    if not error:
        return None
    return min((one for one in some if one.error > 0), key=lambda one: abs(math.log(one.error / error)), default=None)


def _foretold(by: Measured | None, error: float) -> float | None:
    """What the law says of an error, told by another."""
    return by.disagreement * error / by.error if by and by.error > 0 else None


def on_hull(one: Option, others: Sequence[Option]) -> bool:
    """Whether an option would be a vertex of the lower hull of bytes against error."""
    return len(others) in hull([*others, one])


def _agree(found: float, foretold: float) -> bool:
    if max(found, foretold) < NEGLIGIBLE:
        return True
    return foretold / LAW_TOLERANCE <= found <= foretold * LAW_TOLERANCE


def _error(weight: PlannedWeight, coding: Coding) -> float:
    change = weight.values - coding.dequantize()
    if weight.importance is not None:
        change *= weight.importance
    return float(np.mean(np.square(change, dtype=np.float64)))
