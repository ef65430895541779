"""Bytes and disagreement of every candidate of a weight, with that weight alone changed.

For small changes of a weight the divergence is quadratic in them: it is in proportion to their mean square. So the
candidates of a scale are measured from the coarsest on, until two steps in a row have gone as that law says; the finer
ones, where it holds all the better, follow from the last measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modelpress.config import CompressConfig
from modelpress.plan.candidates import Candidate, Coding, encode
from modelpress.plan.costs import Cost, coding_cost
from modelpress.plan.judge import FedWeights
from modelpress.plan.tensors import PlannedWeight

LAW_TOLERANCE = 1.25
"""The law is held to go on where measured ÷ foretold lies within this factor of 1."""
AGREEING_STEPS = 2
NEGLIGIBLE = 1e-12
"""A disagreement below is the noise of float32 sums, and says nothing about a law."""


@dataclass(frozen=True)
class Measured:
    """A candidate of a weight."""

    candidate: Candidate
    cost: Cost
    disagreement: float
    """With this weight alone changed."""
    is_measured: bool
    """Or foretold by the law."""


def least_measurements(weight: PlannedWeight) -> int:
    """How many measurements a weight takes where the law holds from the coarsest candidate on."""
    scales = [one.scale for one in weight.candidates]
    return sum(min(scales.count(scale), 1 + AGREEING_STEPS) for scale in set(scales))


def measure(weight: PlannedWeight, judge: FedWeights, compression: CompressConfig | None) -> list[Measured]:
    """Every candidate of a weight, in the order of `weight.candidates`."""
    found: dict[Candidate, Measured] = {}
    for scale in dict.fromkeys(one.scale for one in weight.candidates):
        rising = sorted((one for one in weight.candidates if one.scale == scale), key=lambda one: one.num_bits)
        found |= {one.candidate: one for one in _curve(weight, rising, judge, compression)}
    return [found[candidate] for candidate in weight.candidates]


def _curve(
    weight: PlannedWeight, rising: Sequence[Candidate], judge: FedWeights, compression: CompressConfig | None
) -> list[Measured]:
    """The candidates of one scale, by rising bits."""
    curve: list[Measured] = []
    agreeing, error_before = 0, 0.0
    for candidate in rising:
        coding = encode(weight.values, candidate, weight.channel_axis)
        error = _mean_square(weight, coding)
        foretold = curve[-1].disagreement * error / error_before if curve and error_before > 0 else None
        is_measured = agreeing < AGREEING_STEPS or foretold is None
        disagreement = foretold
        if is_measured or disagreement is None:
            disagreement = judge.disagreement({weight.name: coding.dequantize()})
            agreeing = agreeing + 1 if foretold is not None and _agree(disagreement, foretold) else 0
        curve.append(Measured(candidate, coding_cost(weight, coding, compression), disagreement, is_measured))
        error_before = error
    return curve


def _agree(found: float, foretold: float) -> bool:
    if max(found, foretold) < NEGLIGIBLE:
        return True
    return foretold / LAW_TOLERANCE <= found <= foretold * LAW_TOLERANCE


def _mean_square(weight: PlannedWeight, coding: Coding) -> float:
    return float(np.mean(np.square(weight.values - coding.dequantize(), dtype=np.float64)))
