"""Who comes first, and who keeps the budget. Arithmetic on what was foretold."""

from __future__ import annotations

import math
from collections.abc import Sequence

from modelpress.config import BudgetConfig, HardwareConfig
from modelpress.config.advise import Objective
from modelpress.reports import Advised, NotPredicted, Outlook, Predicted, Prediction
from modelpress.reports.advice import Metric

MEASURES: dict[Objective, Metric] = {
    "bytes": "published_bytes",
    "latency": "latency_seconds",
    "throughput": "throughput_per_second",
    "cold-start": "cold_start_seconds",
    "cost": "cost_per_million",
}
"""What is to be least; of throughput, most."""

TIE = 1.02
"""What is foretold to be worse by less than this factor is as good."""

BINDING: dict[str, Objective] = {
    "storage-transfer": "cold-start",
    "memory-bandwidth": "latency",
    "latency": "latency",
    "compute": "throughput",
    "energy-cost": "throughput",
}
"""What to make best when a resource binds: the number that it shows in. Energy and cost go with a sample's time."""


def gain(now: Outlook, then: Outlook | None, objective: Objective) -> Prediction:
    """How many times better, by the interval of what comes after."""
    if then is None:
        return NotPredicted(not_predicted="it cannot be had here")
    before: Prediction = getattr(now, MEASURES[objective])
    after: Prediction = getattr(then, MEASURES[objective])
    for found in (before, after):
        if isinstance(found, NotPredicted):
            return found
    assert isinstance(before, Predicted)
    assert isinstance(after, Predicted)
    if min(before.value, after.value) <= 0:
        return NotPredicted(not_predicted=f"{MEASURES[objective]} foretold as {after.value:g}")
    if objective == "throughput":
        return after.scaled(1 / before.value, by="throughput")
    low = max(after.low, 1e-3 * after.value)  # an interval that reaches 0 says nothing of the other end
    return Predicted(
        value=before.value / after.value, low=before.value / after.high, high=before.value / low, by=MEASURES[objective]
    )


def obstacles(found: Outlook, budget: BudgetConfig, hardware: HardwareConfig, caution: float) -> list[str]:
    """What of a budget is not kept, by what is foretold; what nothing is foretold of is not kept.

    Args:
        found: what is foretold.
        budget: limits; one of 0 is none, but of the quality.
        hardware: its `memory_bytes` is a limit where it is given.
        caution: 0 looks at the foretold values, 1 at the worse ends of their intervals.
    """
    asked: list[tuple[Metric, float, str]] = [("quality_drop", budget.max_quality_drop, "at most")]
    asked += [("published_bytes", budget.max_bytes, "at most")] if budget.max_bytes else []
    asked += [("latency_seconds", budget.max_latency_seconds, "at most")] if budget.max_latency_seconds else []
    least = budget.min_throughput_per_second
    asked += [("throughput_per_second", least, "at least")] if least else []
    asked += [("memory_bytes", hardware.memory_bytes, "at most")] if hardware.memory_bytes else []
    broken = []
    for metric, limit, way in asked:
        one: Prediction = getattr(found, metric)
        if isinstance(one, NotPredicted):
            broken.append(f"{metric} is not foretold: {one.not_predicted}")
            continue
        worse = one.high if way == "at most" else one.low
        taken = one.value + caution * (worse - one.value)
        kept = taken <= limit if way == "at most" else taken >= limit
        if not kept:
            broken.append(f"{metric} {taken:,.4g} is foretold, {way} {limit:,.4g} is asked")
    return broken


def ranked(every: Sequence[Advised], objective: Objective) -> list[Advised]:
    """Those that fit, the best first; then those that do not, and last those of which the measure is not foretold.

    Of two that are foretold the same, the one that loses less quality comes first.
    """

    def key(one: Advised) -> tuple[bool, float, float]:
        drop = one.outlook.value("quality_drop") if one.outlook else None
        return not one.fits, _cost(one, objective), drop if drop is not None else math.inf

    return sorted(every, key=key)


def chosen(every: Sequence[Advised], objective: Objective) -> Advised | None:
    """Of those that a recipe can say and that fit, the best; of those that are as good, the one of fewest stages, and
    of these the one that loses least: nobody takes a risk for a gain that no measurement would find."""
    fit = [one for one in every if one.fits and one.in_recipe and _cost(one, objective) < math.inf]
    if not fit:
        return None
    best = min(_cost(one, objective) for one in fit)

    def key(one: Advised) -> tuple[int, float, float]:
        drop = one.outlook.value("quality_drop") if one.outlook else None
        return len(one.stages), drop if drop is not None else math.inf, _cost(one, objective)

    return min((one for one in fit if _cost(one, objective) <= TIE * best), key=key)


def _cost(one: Advised, objective: Objective) -> float:
    """What is to be least; infinite where nothing is foretold."""
    value = one.outlook.value(MEASURES[objective]) if one.outlook else None
    if value is None:
        return math.inf
    return 1 / max(value, 1e-300) if objective == "throughput" else value
