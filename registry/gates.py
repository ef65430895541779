"""The gate: who may become champion. Pure arithmetic on numbers that others measured.

Quality is tested for non-inferiority, paired by sample: the candidate passes when the lower end of the one-sided
interval of `candidate − reference` lies above −margin, fails when the upper end lies below it, and is inconclusive in
between. Only a pass promotes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from modelpress import intervals
from modelpress.config import GateConfig
from modelpress.reports import Report

Verdict = Literal["pass", "fail", "inconclusive"]
OTHER_SAMPLES = (
    "the two were scored on other samples; run the reference's recipe again on the present ones, point the alias at "
    "that pack with `modelpress rollback NAME --to DIGEST`, then promote this one again"
)
APPROVAL = "approval"
"""Name of the check that a person answers."""
Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """Per-sample scores of one model on one set of samples; higher is better."""

    scores: Scores | None
    """(samples,), float64; None: never measured."""
    samples: str
    """Digest of the samples in their order: scores pair only where it is the same."""
    metric: str
    """Name of the score."""


@dataclass(frozen=True)
class Evidence:
    """All that the gate looks at. None: not measured."""

    candidate: Scored
    source: Scored
    champion: Scored | None
    """None: there is no champion yet."""
    compression_ratio: float | None
    """Source bytes ÷ published bytes."""
    speedup: float | None
    """Throughput ÷ the source model's, both in ONNX Runtime at the largest measured batch."""
    attribution: intervals.Interval | None
    """Rank correlation of the attributions with the source model's, both in ONNX Runtime."""
    coverage: float | None
    """Share of the eligible weights that are integers; read only where `quantized`."""
    quantized: bool
    """Whether the recipe asked for quantization."""


class Check(Report):
    """One condition and how it went."""

    name: str
    """What was looked at, such as `quality against the champion`."""
    verdict: Verdict
    """How it went."""
    reason: str
    """With the numbers that decided."""
    required_samples: int | None = None
    """For an inconclusive comparison: paired samples that would decide with 80 % power."""


class Decision(Report):
    """What the gate says. It is stored, logged and shown as it stands; nobody rephrases it."""

    promote: bool
    """Whether the candidate becomes champion: every check passed."""
    verdict: Verdict
    """`fail` where a check failed, else `inconclusive` where one was, else `pass`."""
    reasons: list[str]
    """One line per check."""
    required_samples: int | None = None
    """The largest of the checks'."""
    checks: list[Check]
    """The single conditions."""
    wait_hours: float | None = None
    """How long a person's answer is waited for, where one is asked for."""

    def line(self) -> str:
        """The decision in one line, for logs."""
        return f"{'promote' if self.promote else 'refuse'} ({self.verdict}): {'; '.join(self.reasons)}"


class Approval(Report):
    """What a person answered."""

    approved: bool
    """Yes or no."""
    by: str
    """The name that was given."""
    reason: str
    """Why."""
    at: str
    """When, UTC."""
    of: str
    """`fingerprint` of the decision that was shown: an answer holds for no other."""


def decide(evidence: Evidence, config: GateConfig) -> Decision:
    """Judge a candidate against the source model, the champion if there is one, and the bounds of the config."""
    checks = [_compare("quality against the source", evidence.candidate, evidence.source, config)]
    if evidence.champion is not None:
        checks.append(_compare("quality against the champion", evidence.candidate, evidence.champion, config))
    checks.append(_at_least("compression ratio", evidence.compression_ratio, config.min_compression_ratio))
    if config.min_speedup > 0:
        checks.append(_at_least("speed-up", evidence.speedup, config.min_speedup))
    if config.min_attribution_agreement > 0:
        checks.append(_same_reasons(evidence.attribution, config.min_attribution_agreement))
    if evidence.quantized:
        checks.append(_covered(evidence.coverage))
    return _conclude(checks)


def fingerprint(pack: str, decision: Decision) -> str:
    """Names what a person is shown: the pack, and all checks but their own, with the numbers."""
    shown = [reason for check, reason in zip(decision.checks, decision.reasons, strict=True) if check.name != APPROVAL]
    return hashlib.sha256("\n".join([pack, *shown]).encode()).hexdigest()[:16]


def with_approval(pack: str, decision: Decision, approval: Approval | None, config: GateConfig) -> Decision:
    """A decision that passed, and what a person said of this very one; one that did not pass is shown to nobody."""
    if not decision.promote:
        return decision
    if approval is None or approval.of != fingerprint(pack, decision):
        check = Check(name=APPROVAL, verdict="inconclusive", reason="a person must agree, and nobody has answered")
    else:
        answer = f"{'yes' if approval.approved else 'no'} by {approval.by} at {approval.at}: {approval.reason}"
        check = Check(name=APPROVAL, verdict="pass" if approval.approved else "fail", reason=answer)
    return _conclude([*decision.checks, check]).model_copy(update={"wait_hours": config.approval_hours})


def waits(decision: Decision) -> bool:
    """Whether nothing but a person's answer is missing."""
    return any(check.name == APPROVAL and check.verdict == "inconclusive" for check in decision.checks)


def recheck(found: Scored, published: Mapping[str, Scored], config: GateConfig) -> Decision:
    """Judge a pack that is published already, by scores that were measured now.

    Args:
        found: today's scores of the published bytes.
        published: what the pack was published with, `source` and `candidate`.
        config: of the gate; its bounds on size, speed and reasons say nothing that could have changed.

    Returns:
        The decision; `promote` says whether it may stay.
    """
    references = (("quality against the source", "source"), ("quality against its publication", "candidate"))
    missing = Scored(None, samples=found.samples, metric=found.metric)
    return _conclude([_compare_again(name, found, published.get(who, missing), config) for name, who in references])


def _conclude(checks: list[Check]) -> Decision:
    verdicts = {check.verdict for check in checks}
    verdict: Verdict = "fail" if "fail" in verdicts else "inconclusive" if "inconclusive" in verdicts else "pass"
    needed = [check.required_samples for check in checks if check.required_samples is not None]
    return Decision(
        promote=verdict == "pass",
        verdict=verdict,
        reasons=[f"{check.name}: {check.verdict}, {check.reason}" for check in checks],
        required_samples=max(needed, default=None),
        checks=checks,
    )


def _compare(name: str, candidate: Scored, reference: Scored, config: GateConfig) -> Check:
    """Paired non-inferiority of the candidate's mean score."""
    problem = _unpaired(candidate, reference)
    if problem is not None:
        return Check(name=name, verdict=problem[0], reason=problem[1])
    assert candidate.scores is not None
    assert reference.scores is not None
    found = intervals.paired_difference(candidate.scores, reference.scores, _two_sided(config))
    verdict, numbers = _judged(candidate, reference, found, f"{candidate.scores.size} samples", config)
    if verdict != "inconclusive":
        return Check(name=name, verdict=verdict, reason=numbers)
    needed = _needed(candidate.scores - reference.scores, config, _two_sided(config))
    advice = f"; about {needed} samples would decide" if needed else ""
    return Check(name=name, verdict="inconclusive", reason=numbers + advice, required_samples=needed)


def _compare_again(name: str, found: Scored, before: Scored, config: GateConfig) -> Check:
    """Non-inferiority to what was measured at publication: paired where the samples are the same ones, else not."""
    problem = _unpaired(found, before)
    if problem is None or problem[0] == "fail":
        return _compare(name, found, before, config)
    assert found.scores is not None
    assert before.scores is not None
    difference = intervals.difference(found.scores, before.scores, _two_sided(config))
    samples = f"{found.scores.size} samples against {before.scores.size} others"
    verdict, numbers = _judged(found, before, difference, samples, config)
    return Check(name=name, verdict=verdict, reason=numbers)


def _judged(
    candidate: Scored, reference: Scored, found: intervals.Interval, samples: str, config: GateConfig
) -> tuple[Verdict, str]:
    """The verdict on a difference of means, and the numbers that decided it."""
    assert candidate.scores is not None
    assert reference.scores is not None
    numbers = (
        f"{candidate.metric} {candidate.scores.mean():.4f} against {reference.scores.mean():.4f}, difference "
        f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}] on {samples}, margin "
        f"{config.margin:g} at {config.confidence:.0%} one-sided"
    )
    if found.low > -config.margin:
        return "pass", numbers
    return ("fail" if found.high < -config.margin else "inconclusive"), numbers


def _two_sided(config: GateConfig) -> float:
    """Confidence of the interval whose lower end is the one-sided bound at `config.confidence`."""
    return 2 * config.confidence - 1


def _unpaired(candidate: Scored, reference: Scored) -> tuple[Verdict, str] | None:
    """Why two sets of scores can't be compared; None where they can."""
    sizes = []
    for who, scored in (("the candidate", candidate), ("the reference", reference)):
        if scored.scores is None or scored.scores.size == 0:
            return "fail", f"{scored.metric} of {who} was not measured"
        bad = int(np.count_nonzero(~np.isfinite(scored.scores)))
        if bad:
            return "fail", f"{bad} of {scored.scores.size} {scored.metric} scores of {who} are not finite"
        sizes.append(scored.scores.size)
    if candidate.metric != reference.metric:
        return "fail", f"the candidate is scored by {candidate.metric}, the reference by {reference.metric}"
    if candidate.samples != reference.samples or sizes[0] != sizes[1]:
        return "inconclusive", OTHER_SAMPLES
    return None


def _needed(differences: Scores, config: GateConfig, two_sided: float) -> int | None:
    """Samples that would decide if the observed difference were the true one; None where no number would."""
    distance = abs(float(differences.mean()) + config.margin)
    deviation = max(float(differences.std()), 1.0 / math.sqrt(differences.size))
    if distance < config.margin / 100:
        return None
    return max(differences.size + 1, intervals.needed_samples(deviation, distance, two_sided))


def _at_least(name: str, value: float | None, least: float) -> Check:
    if value is None or not math.isfinite(value):
        return Check(name=name, verdict="fail", reason=f"not measured, at least {least:g}× is asked")
    verdict: Verdict = "pass" if value >= least else "fail"
    return Check(name=name, verdict=verdict, reason=f"{value:.2f}×, at least {least:g}× is asked")


def _same_reasons(found: intervals.Interval | None, least: float) -> Check:
    name = "attribution agreement"
    if found is None or not all(map(math.isfinite, (found.value, found.low, found.high))):
        reason = f"not measured, at least {least:g} is asked; set evaluate.attribution_samples"
        return Check(name=name, verdict="fail", reason=reason)
    verdict: Verdict = "pass" if found.low >= least else "fail" if found.high < least else "inconclusive"
    numbers = f"rank correlation {found.value:.3f} [{found.low:.3f}, {found.high:.3f}], at least {least:g} is asked"
    return Check(name=name, verdict=verdict, reason=numbers)


def _covered(coverage: float | None) -> Check:
    name = "quantization coverage"
    if coverage is None or not math.isfinite(coverage):
        return Check(name=name, verdict="fail", reason="not measured")
    verdict: Verdict = "pass" if coverage > 0 else "fail"
    return Check(name=name, verdict=verdict, reason=f"{coverage:.1%} of the eligible weights are integers")
