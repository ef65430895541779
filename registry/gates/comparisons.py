"""Is the candidate worse? Paired tests of non-inferiority, of equivalence, of floors, and what several of them say.

Each question asks where an interval lies. Non-inferiority (FDA 2016, "Non-Inferiority Clinical Trials", section III)
passes when the lower end of the one-sided interval of `candidate − reference` lies above −margin and fails when the
upper end lies below it. Equivalence asks two one-sided tests (Schuirmann 1987, doi:10.1007/BF01068419): both ends
within ±margin. A floor asks it of a mean. In between, the question is inconclusive, and says how many samples would
decide it. Right-or-wrong scores take Tango's score interval of paired shares, which holds its level where hardly any
answer differs and inverts a test that allows for the margin, as McNemar's (of equality alone) cannot; other scores a
bootstrap (`modelpress.intervals`).

Several questions are joined so that both kinds of mistake are bounded by 1 − confidence, for the whole of them:

- *Passing* requires every question to pass. The hypothesis "at least one is too bad" is then rejected by an
  intersection–union test (Berger 1982, doi:10.1080/00401706.1982.10487790): to pass wrongly, the question that truly
  fails must pass, and that happens with its own level at most. No correction is due, and one would only cost power.
- *Failing* claims that some question fails, and the more are asked, the likelier chance alone makes one look so. Those
  claims take Holm's step-down correction (Holm 1979, Scandinavian Journal of Statistics 6:65–70). What fails alone and
  not among all is inconclusive: neither of them promotes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from modelpress import intervals
from modelpress.config import GateConfig
from modelpress.reports import Check, Verdict
from modelpress.scores import Scored, Scores

OTHER_SAMPLES = (
    "the two were scored on other samples; run the reference's recipe again on the present ones, point the alias at "
    "that pack with `modelpress rollback NAME --to DIGEST`, then promote this one again"
)
SOURCE, CHAMPION, PUBLICATION = "the source", "the champion", "its publication"


@dataclass(frozen=True)
class Question:
    """One comparison: an interval at any confidence, and where it must lie."""

    name: str
    interval: Callable[[float], intervals.Interval]
    """By two-sided confidence."""
    low: float
    """A pass needs the whole interval above this."""
    high: float
    """And below this; infinite where nothing is too good."""
    told: Callable[[intervals.Interval], str]
    """The numbers, for people."""
    deviation: float | None = None
    """Of what the mean is taken of; `needed` looks at it. None: it is not known any more."""
    samples: int = 0
    """How many there are."""

    def verdict(self, found: intervals.Interval) -> Verdict:
        """Of this question alone."""
        if found.low > self.low and found.high < self.high:
            return "pass"
        return "fail" if found.high < self.low or found.low > self.high else "inconclusive"

    def needed(self, confidence: float) -> int | None:
        """Samples that would decide if what was observed were the truth; None where no number of them would."""
        if self.deviation is None:
            return None
        value = self.interval(confidence).value
        distance = min(abs(value - self.low), abs(value - self.high))
        scale = self.high - self.low if math.isfinite(self.high) else 2 * abs(self.low)
        if distance <= scale / 200:
            return None
        deviation = max(self.deviation, 1.0 / math.sqrt(self.samples))
        return max(self.samples + 1, intervals.needed_samples(deviation, distance, confidence))


def compare(
    candidate: Scored,
    references: Sequence[tuple[str, Scored]],
    config: GateConfig,
    *,
    unpaired: bool = False,
    beside: Sequence[Question | Check] = (),
) -> list[Check]:
    """Judge a candidate's scores against those of others: the metric, further metrics, and slices.

    Args:
        candidate: what is judged; its slices count for all.
        references: by what they are called in the checks' names.
        config: which metrics and slices, with which margins; `equivalence` is asked against the source alone, as a
            candidate may well be better than the champion.
        unpaired: where the samples differ, compare means and not samples; else that is inconclusive.
        beside: further questions of the same family, by other intervals.

    Returns:
        A check for each comparison, in a fixed order.
    """
    asked = [
        *(part for who, reference in references for part in _against(who, candidate, reference, config, unpaired)),
        *_floors(candidate, config),
        *beside,
    ]
    questions = [one for one in asked if isinstance(one, Question)]
    answers = iter(_answer(questions, config))
    return [one if isinstance(one, Check) else next(answers) for one in asked]


def holm(hypotheses: int, level: float, rejected: Callable[[float], frozenset[int]]) -> frozenset[int]:
    """Holm's step-down procedure, for tests that say what they reject at a level rather than a p-value.

    Args:
        hypotheses: how many there are.
        level: largest chance of one wrong rejection among them all.
        rejected: the hypotheses, by number, that their own tests reject at a level; more at a larger one.

    Returns:
        What is rejected: the p-values in order are held to level ÷ n, level ÷ (n − 1), … until one is too large.
    """
    done: frozenset[int] = frozenset()
    while len(done) < hypotheses:
        more = done | rejected(level / (hypotheses - len(done)))
        if more == done:
            break
        done = more
    return done


def _answer(questions: Sequence[Question], config: GateConfig) -> list[Check]:
    level = 1 - config.confidence
    alone = [question.interval(1 - 2 * level) for question in questions]
    verdicts = [question.verdict(found) for question, found in zip(questions, alone, strict=True)]

    def failing(at: float) -> frozenset[int]:
        # At a stricter level fewer fail: those that do not fail alone need no second look.
        suspects = [number for number, verdict in enumerate(verdicts) if verdict == "fail"]
        if at == level:
            return frozenset(suspects)
        return frozenset(n for n in suspects if questions[n].verdict(questions[n].interval(1 - 2 * at)) == "fail")

    certain = holm(len(questions), level, failing)
    checks = []
    for number, (question, found, verdict) in enumerate(zip(questions, alone, verdicts, strict=True)):
        reason, needed, strict = question.told(found), None, level
        if verdict == "fail" and number not in certain:
            verdict, strict = "inconclusive", level / len(questions)
            reason += f"; too little to fail by, among {len(questions)} comparisons"
        if verdict == "inconclusive":
            needed = question.needed(1 - 2 * strict)
            reason += f"; about {needed} samples would decide" if needed else ""
        checks.append(Check(name=question.name, verdict=verdict, reason=reason, required_samples=needed))
    return checks


def _against(
    who: str, candidate: Scored, reference: Scored, config: GateConfig, unpaired: bool
) -> Iterator[Question | Check]:
    """All comparisons with one other model."""
    same = who == SOURCE and config.equivalence
    name = f"quality against {who}"
    yield _question(name, candidate, reference, config, config.margin, unpaired=unpaired, same=same)
    for metric, margin in config.further_margins.items():
        ours, theirs = (replace(one, scores=one.further.get(metric), metric=metric) for one in (candidate, reference))
        if ours.scores is not None and theirs.scores is None and reference.scores is not None:
            reason = f"published before {metric} was measured; {OTHER_SAMPLES.partition('; ')[2]}"
            yield Check(name=f"{metric} against {who}", verdict="inconclusive", reason=reason)
            continue
        yield _question(f"{metric} against {who}", ours, theirs, config, margin, unpaired=unpaired, same=same)
    if config.slice_margin:
        yield from _slices(who, candidate, reference, config, unpaired)


def _slices(
    who: str, candidate: Scored, reference: Scored, config: GateConfig, unpaired: bool
) -> Iterator[Question | Check]:
    """Each slice of the samples, compared with one other model."""
    if not candidate.slices:
        reason = "gate.slice_margin asks for them, and the workload names none: give it `slices`"
        yield Check(name=f"slices against {who}", verdict="fail", reason=reason)
    there = reference if unpaired and reference.samples != candidate.samples else candidate
    for group, mask in candidate.slices.items():
        name = f"slice {group} against {who}"
        theirs = there.slices.get(group)
        if not mask.any() or theirs is None or not theirs.any():
            yield Check(name=name, verdict="inconclusive", reason="no sample is in it, on one side or both")
        else:
            ours = _masked(candidate, mask), _masked(reference, theirs)
            yield _question(name, *ours, config, config.slice_margin, unpaired=unpaired)


def _floors(candidate: Scored, config: GateConfig) -> Iterator[Question | Check]:
    """The least that a slice may be worth."""
    for group, floor in config.slice_floors.items():
        name, mask = f"slice {group}", candidate.slices.get(group)
        if mask is None:
            known = ", ".join(candidate.slices) or "none"
            reason = f"gate.slice_floors asks for it, and the workload names no such slice; there are: {known}"
            yield Check(name=name, verdict="fail", reason=reason)
            continue
        found = _masked(candidate, mask)
        problem = _unmeasured("the candidate", found)
        if not mask.any():
            yield Check(name=name, verdict="inconclusive", reason="no sample is in it")
        elif problem is not None:
            yield Check(name=name, verdict="fail", reason=problem)
        else:
            yield _floor(name, found, floor, config)


def _floor(name: str, found: Scored, floor: float, config: GateConfig) -> Question:
    scores = found.scores
    assert scores is not None

    def told(interval: intervals.Interval) -> str:
        ends = f"{interval.value:.4f} [{interval.low:.4f}, {interval.high:.4f}]"
        asked = f"more than {floor:g} is asked at {config.confidence:.0%} one-sided"
        return f"{found.metric} {ends} on {scores.size} samples, {asked}"

    return Question(
        name=name,
        interval=lambda confidence: intervals.mean(scores, confidence),
        low=floor,
        high=math.inf,
        told=told,
        deviation=float(scores.std()),
        samples=scores.size,
    )


def _question(
    name: str,
    candidate: Scored,
    reference: Scored,
    config: GateConfig,
    margin: float,
    *,
    unpaired: bool = False,
    same: bool = False,
) -> Question | Check:
    """Non-inferiority, or equivalence, of the candidate's mean score; a check where nothing can be compared."""
    for who, scored in (("the candidate", candidate), ("the reference", reference)):
        problem = _unmeasured(who, scored)
        if problem is not None:
            return Check(name=name, verdict="fail", reason=problem)
    if candidate.metric != reference.metric:
        reason = f"the candidate is scored by {candidate.metric}, the reference by {reference.metric}"
        return Check(name=name, verdict="fail", reason=reason)
    ours, theirs = candidate.scores, reference.scores
    assert ours is not None
    assert theirs is not None
    paired = candidate.samples == reference.samples and ours.size == theirs.size
    if not paired and not unpaired:
        return Check(name=name, verdict="inconclusive", reason=OTHER_SAMPLES)
    difference = intervals.paired_difference if paired else intervals.difference
    samples = f"{ours.size} samples" if paired else f"{ours.size} samples against {theirs.size} others"
    kind = "equivalence " if same else ""

    def told(found: intervals.Interval) -> str:
        return (
            f"{candidate.metric} {ours.mean():.4f} against {theirs.mean():.4f}, difference "
            f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}] on {samples}, {kind}margin "
            f"{margin:g} at {config.confidence:.0%} one-sided"
        )

    return Question(
        name=name,
        interval=lambda confidence: difference(ours, theirs, confidence),
        low=-margin,
        high=margin if same else math.inf,
        told=told,
        deviation=float((ours - theirs).std() if paired else math.hypot(ours.std(), theirs.std())),
        samples=ours.size,
    )


def _masked(scored: Scored, mask: np.ndarray) -> Scored:
    """The scores of the samples in a group, where there are scores for it."""
    scores = scored.scores
    fits = scores is not None and scores.shape == mask.shape
    picked: Scores | None = scores[mask] if scores is not None and fits else scores
    return replace(scored, scores=picked, further={}, slices={})


def _unmeasured(who: str, scored: Scored) -> str | None:
    """Why scores say nothing; None where they do."""
    if scored.scores is None or scored.scores.size == 0:
        return f"{scored.metric} of {who} was not measured"
    bad = int(np.count_nonzero(~np.isfinite(scored.scores)))
    if bad:
        return f"{bad} of {scored.scores.size} {scored.metric} scores of {who} are not finite"
    return None
