"""Whether a candidate answers for the source model's reasons: a question of the same family as those of quality."""

from __future__ import annotations

import math
from collections.abc import Iterator

from modelpress import intervals
from modelpress.config import GateConfig
from modelpress.reports import Check
from registry.gates.comparisons import Question
from registry.gates.evidence import Evidence

NAME = "attribution agreement"


def reasons(evidence: Evidence, config: GateConfig) -> Iterator[Question | Check]:
    """The question, where the config asks it; a check where nothing was measured.

    Of the attributions only an interval at one confidence is known. At others it is taken for normal.
    """
    least, found = config.min_attribution_agreement, evidence.attribution
    if least <= 0:
        return
    if found is None or not all(map(math.isfinite, (found.value, found.low, found.high))):
        reason = f"not measured, at least {least:g} is asked; set evaluate.attribution_samples"
        yield Check(name=NAME, verdict="fail", reason=reason)
        return
    measured = evidence.attribution_confidence

    def told(interval: intervals.Interval) -> str:
        ends = f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
        return f"rank correlation {ends}, more than {least:g} is asked at {config.confidence:.0%} one-sided"

    yield Question(
        name=NAME,
        interval=lambda confidence: intervals.rescaled(found, measured, confidence),
        low=least,
        high=math.inf,
        told=told,
    )
