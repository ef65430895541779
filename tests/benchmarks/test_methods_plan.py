from __future__ import annotations

from benchmarks.methods.plan import _best
from modelpress.reports import PlanPoint


def point(label: str, size: int, disagreement: float) -> PlanPoint:
    return PlanPoint(label=label, coded_bytes=size, disagreement=disagreement, predicted_disagreement=None)


def test_the_peer_is_the_smallest_of_all_settings_that_agree_as_well() -> None:
    """A setting of more bits may be the smaller one, once it is coded."""
    five = [point("5 bits, scale per tensor", 90, 0.3), point("5 bits, groups of 64", 120, 0.1)]
    six = [point("6 bits, scale per tensor", 100, 0.09), point("6 bits, groups of 64", 150, 0.01)]
    assert _best(five, [*five, *six]).label == "6 bits, scale per tensor"
