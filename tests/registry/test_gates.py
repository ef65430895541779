"""The gate's table: each condition, each verdict, each thing that can be missing."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpress.config import GateConfig
from modelpress.intervals import Interval
from registry.gates import (
    Approval,
    Decision,
    Evidence,
    Override,
    Published,
    Scored,
    decide,
    fingerprint,
    recheck,
    waits,
    with_approval,
    with_override,
)

SAMPLES = 2_000
SOURCE, CHAMPION = "quality against the source", "quality against the champion"
PUBLISHED = Published(read_bytes=1_000, size_bytes=900, signed_by=None)
GATE = GateConfig(margin=0.01, confidence=0.95, min_compression_ratio=4.0, min_speedup=2.0)


def answers(wrong: int, *, first: int = 0, samples: int = SAMPLES) -> Scored:
    """0/1 scores with `wrong` wrong answers, from sample `first` on."""
    scores = np.ones(samples)
    scores[first : first + wrong] = 0
    return Scored(scores, "same samples", "accuracy")


def evidence(**changes: object) -> Evidence:
    """Evidence that passes."""
    passing = Evidence(
        candidate=answers(40),
        source=answers(40),
        champion=answers(41),
        compression_ratio=5.0,
        speedup=3.0,
        attribution=None,
        coverage=0.9,
        quantized=True,
        published=PUBLISHED,
    )
    return replace(passing, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (Interval(0.9, 0.85, 0.95), "pass"),
        (Interval(0.8, 0.75, 0.85), "inconclusive"),
        (Interval(0.6, 0.5, 0.7), "fail"),
        (Interval(math.nan, 0.9, 0.9), "fail"),
        (None, "fail"),
    ],
)
def test_attributions_are_asked_for_by_the_config(found: Interval | None, verdict: str) -> None:
    asked = GATE.model_copy(update={"min_attribution_agreement": 0.8})
    assert check(decide(evidence(attribution=found), asked), "attribution agreement") == verdict
    assert "attribution agreement" not in [one.name for one in decide(evidence(attribution=found), GATE).checks]


def test_attributions_fail_by_the_same_correction_as_quality_does() -> None:
    """Below the bound by a little more than one comparison alone would need, at 95 % one-sided."""
    asked = GATE.model_copy(update={"min_attribution_agreement": 0.8})
    near = Interval(0.7, 0.585, 0.815)  # two-sided 95 %: one-sided 95 % ends at 0.7965
    alone = decide(evidence(attribution=near, champion=None), asked.model_copy(update={"margin": 0.5}))
    among = next(one for one in alone.checks if one.name == "attribution agreement")
    assert among.verdict == "inconclusive"
    assert "too little to fail by, among 2 comparisons" in among.reason
    assert among.required_samples is None
    wider = decide(evidence(attribution=near, attribution_confidence=0.99, champion=None), asked)
    assert check(wider, "attribution agreement") == "fail", "what was sure at 99 % is surer at 95 %"


def check(decision: Decision, name: str) -> str:
    return next(check.verdict for check in decision.checks if check.name == name)


def test_all_conditions_met_promotes() -> None:
    decision = decide(evidence(), GATE)
    assert decision.promote
    assert decision.verdict == "pass"
    assert [check.name for check in decision.checks] == [
        "quality against the source",
        "quality against the champion",
        "compression ratio",
        "speed-up",
        "quantization coverage",
        "published bytes",
    ]
    assert decision.line().startswith(
        "promote (pass): quality against the source: pass, accuracy 0.9800 against 0.9800"
    )


@pytest.mark.parametrize(
    ("changes", "failing", "verdict"),
    [
        pytest.param({"candidate": answers(140)}, SOURCE, "fail", id="5 points worse"),
        pytest.param({"champion": answers(0), "candidate": answers(90)}, CHAMPION, "fail", id="champion better"),
        pytest.param({"candidate": answers(55)}, SOURCE, "inconclusive", id="0.75 points worse"),
        pytest.param({"compression_ratio": 3.99}, "compression ratio", "fail", id="too many bytes"),
        pytest.param({"compression_ratio": None}, "compression ratio", "fail", id="bytes not measured"),
        pytest.param({"speedup": 1.99}, "speed-up", "fail", id="too slow"),
        pytest.param({"speedup": None}, "speed-up", "fail", id="speed not measured"),
        pytest.param({"speedup": float("nan")}, "speed-up", "fail", id="speed is NaN"),
        pytest.param({"coverage": 0.0}, "quantization coverage", "fail", id="quantized nothing"),
        pytest.param({"coverage": None}, "quantization coverage", "fail", id="coverage not measured"),
        pytest.param({"published": None}, "published bytes", "fail", id="published bytes not read again"),
        pytest.param(
            {"candidate": Scored(None, "same samples", "accuracy")}, SOURCE, "fail", id="candidate not scored"
        ),
        pytest.param({"source": Scored(None, "same samples", "accuracy")}, SOURCE, "fail", id="source not scored"),
        pytest.param({"source": Scored(np.zeros(0), "same samples", "accuracy")}, SOURCE, "fail", id="no samples"),
        pytest.param({"source": replace(answers(40), metric="mrr")}, SOURCE, "fail", id="other metric"),
        pytest.param(
            {"champion": replace(answers(41), samples="others")}, CHAMPION, "inconclusive", id="other samples"
        ),
        pytest.param({"champion": answers(41, samples=1_000)}, CHAMPION, "inconclusive", id="fewer samples"),
    ],
)
def test_one_condition_unmet_refuses(changes: dict[str, object], failing: str, verdict: str) -> None:
    decision = decide(evidence(**changes), GATE)
    assert not decision.promote
    assert decision.verdict == verdict
    assert check(decision, failing) == verdict
    assert any(reason.startswith(f"{failing}: {verdict}, ") for reason in decision.reasons)


def test_a_single_nan_score_fails_and_is_counted() -> None:
    scores = np.ones(SAMPLES)
    scores[7] = np.nan
    decision = decide(evidence(candidate=Scored(scores, "same samples", "accuracy")), GATE)
    assert decision.verdict == "fail"
    assert "1 of 2000 accuracy scores of the candidate are not finite" in decision.line()


def test_without_a_champion_the_source_alone_is_the_measure() -> None:
    decision = decide(evidence(champion=None), GATE)
    assert decision.promote
    assert not any("champion" in check.name for check in decision.checks)


def test_unasked_conditions_are_not_checked() -> None:
    decision = decide(evidence(speedup=None, coverage=None, quantized=False), GateConfig(min_compression_ratio=0))
    assert decision.promote
    assert {check.name for check in decision.checks}.isdisjoint({"speed-up", "quantization coverage"})


def test_equal_models_pass_where_samples_suffice_and_are_inconclusive_where_they_do_not() -> None:
    many = decide(evidence(champion=None), GATE)
    few = decide(evidence(candidate=answers(1, samples=50), source=answers(1, samples=50), champion=None), GATE)
    assert many.verdict == "pass"
    assert few.verdict == "inconclusive"
    assert few.required_samples is not None
    assert few.required_samples > 50


@pytest.mark.parametrize("samples", [1, 50])
@pytest.mark.parametrize("loss", [0.0, 0.02])
def test_few_samples_of_a_continuous_score_are_inconclusive(samples: int, loss: float) -> None:
    source = Scored(np.full(samples, 0.5), "same samples", "mrr")
    candidate = Scored(np.full(samples, 0.5 - loss), "same samples", "mrr")
    decision = decide(evidence(candidate=candidate, source=source, champion=None), GATE)
    assert decision.verdict == "inconclusive"
    assert decision.required_samples is not None
    assert decision.required_samples > samples


def test_a_failed_check_outweighs_an_inconclusive_one() -> None:
    decision = decide(evidence(candidate=answers(55), speedup=0.5), GATE)
    assert decision.verdict == "fail"
    assert check(decision, "quality against the source") == "inconclusive"


def test_enough_samples_decide_what_the_required_number_promised() -> None:
    """As many samples as the gate asked for, with the same share of disagreement, end the doubt."""
    doubtful = decide(
        evidence(candidate=answers(12, samples=500), source=answers(10, samples=500), champion=None), GATE
    )
    assert doubtful.verdict == "inconclusive"
    assert doubtful.required_samples is not None
    factor = -(-doubtful.required_samples // 500)
    more = 500 * factor
    candidate, source = answers(12 * factor, samples=more), answers(10 * factor, samples=more)
    assert decide(evidence(candidate=candidate, source=source, champion=None), GATE).verdict == "pass"


@given(
    wrong=st.integers(0, 60),
    extra=st.integers(0, 60),
    better=st.integers(0, 60),
    confidence=st.floats(0.6, 0.99),
)
def test_a_better_candidate_is_never_judged_worse(wrong: int, extra: int, better: int, confidence: float) -> None:
    order = {"fail": 0, "inconclusive": 1, "pass": 2}
    gate = GateConfig(margin=0.01, confidence=confidence)
    source = answers(wrong)
    worse = decide(evidence(candidate=answers(wrong + extra), source=source, champion=None), gate)
    best = decide(evidence(candidate=answers(wrong + max(0, extra - better)), source=source, champion=None), gate)
    assert order[best.verdict] >= order[worse.verdict]


@given(st.integers(0, 2**31))
def test_continuous_scores_follow_the_bootstrap(seed: int) -> None:
    """A uniform loss of twice the margin fails; the same scores with noise far below the margin pass."""
    generator = np.random.default_rng(seed)
    base = generator.uniform(0.2, 0.8, 400)
    source = Scored(base, "same samples", "mrr")
    lost = Scored(base - 0.04 + generator.normal(0, 0.001, 400), "same samples", "mrr")
    kept = Scored(base + generator.normal(0, 0.0005, 400), "same samples", "mrr")
    gate = GateConfig(margin=0.02)
    assert decide(evidence(candidate=lost, source=source, champion=None), gate).verdict == "fail"
    assert decide(evidence(candidate=kept, source=source, champion=None), gate).verdict == "pass"


AGAINST_ITSELF = "quality against its publication"


def published(source: Scored, candidate: Scored) -> dict[str, Scored]:
    return {"source": source, "candidate": candidate}


def test_a_recheck_on_the_same_samples_is_paired() -> None:
    before = published(answers(40), answers(41))
    same = recheck(answers(41), before, GATE)
    assert [one.name for one in same.checks] == [SOURCE, AGAINST_ITSELF]
    assert same.promote
    assert f"on {SAMPLES} samples," in same.reasons[0]
    assert recheck(answers(140), before, GATE).verdict == "fail"


def test_a_recheck_on_other_samples_takes_them_as_independent_and_is_less_sure() -> None:
    """Ten fewer right answers of 2000 pass where they are paired; between two sets of samples they tell nothing."""
    before = published(answers(40), answers(40))
    moved = replace(answers(50), samples="other samples")
    assert recheck(answers(50), before, GATE).verdict == "pass"
    unsure = recheck(moved, before, GATE)
    assert unsure.verdict == "inconclusive"
    assert not unsure.promote
    assert f"on {SAMPLES} samples against {SAMPLES} others," in unsure.reasons[0]
    assert recheck(replace(answers(400), samples="other samples"), before, GATE).verdict == "fail"
    fewer = replace(answers(0, samples=1500), samples="other samples")
    assert recheck(fewer, before, GATE).verdict == "pass", "the numbers of samples may differ"


@pytest.mark.parametrize(
    ("found", "before", "said"),
    [
        (answers(40), {}, "of the reference was not measured"),
        (replace(answers(40), metric="mrr"), published(answers(40), answers(40)), "scored by mrr"),
        (replace(answers(40), scores=np.full(SAMPLES, math.nan)), published(answers(40), answers(40)), "not finite"),
    ],
)
def test_a_recheck_without_something_to_compare_fails(found: Scored, before: dict[str, Scored], said: str) -> None:
    decision = recheck(found, before, GATE)
    assert decision.verdict == "fail"
    assert all(said in reason for reason in decision.reasons)


ASKING = GATE.model_copy(update={"approval": True, "approval_hours": 2.0})
PACK = "a" * 64


def answer(decision: Decision, *, approved: bool = True, pack: str = PACK) -> Approval:
    return Approval(approved=approved, by="Anna", reason="looks right", at="today", of=fingerprint(pack, decision))


def test_what_passed_waits_for_a_person_and_says_what_they_said() -> None:
    passed = decide(evidence(), ASKING)
    waiting = with_approval(PACK, passed, None, ASKING)
    assert (waiting.promote, waiting.verdict, waits(waiting), waiting.wait_hours) == (False, "inconclusive", True, 2.0)
    yes = with_approval(PACK, passed, answer(waiting), ASKING)
    assert (yes.promote, yes.verdict, waits(yes)) == (True, "pass", False)
    assert yes.reasons[-1] == "approval: pass, yes by Anna at today: looks right"
    no = with_approval(PACK, passed, answer(waiting, approved=False), ASKING)
    assert (no.promote, no.verdict, waits(no)) == (False, "fail", False)


def test_an_answer_holds_for_the_pack_and_the_numbers_that_were_shown() -> None:
    passed = decide(evidence(), ASKING)
    other = decide(evidence(compression_ratio=5.5), ASKING)
    assert waits(with_approval(PACK, other, answer(passed), ASKING))
    assert waits(with_approval("b" * 64, passed, answer(passed), ASKING))
    assert with_approval("b" * 64, passed, answer(passed, pack="b" * 64), ASKING).promote


def test_no_yes_promotes_what_did_not_pass() -> None:
    failed = decide(evidence(compression_ratio=1.0), ASKING)
    assert with_approval(PACK, failed, answer(failed), ASKING) == failed


AGAINST = Override(by="Anna", reason="the old one is worse for our customers")


def test_an_override_promotes_what_did_not_pass_and_says_whose_it_is() -> None:
    refused = decide(evidence(compression_ratio=1.0), GATE)
    overridden = with_override(refused, AGAINST)
    assert (overridden.promote, overridden.verdict, overridden.checks) == (True, "fail", refused.checks)
    said = "promote (fail, overridden by Anna: the old one is worse for our customers): quality against the source"
    assert overridden.line().startswith(said)
    assert overridden.outcome() == "fail, overridden by Anna: the old one is worse for our customers"


def test_what_passed_needs_no_override_and_names_nobody() -> None:
    passed = decide(evidence(), GATE)
    assert with_override(passed, AGAINST) == passed
    assert with_override(passed, None) == passed


@pytest.mark.parametrize(
    "changes",
    [
        {"published": None},
        {"published": None, "compression_ratio": 1.0},
        {"published": replace(PUBLISHED, signed_by=())},
    ],
    ids=["bytes", "bytes and more", "signature"],
)
def test_nobody_overrides_that_the_bytes_are_the_judged_ones(changes: dict[str, object]) -> None:
    gate = GATE.model_copy(update={"require_signature": "signed_by" in str(changes.get("published"))})
    refused = with_override(decide(evidence(**changes), gate), AGAINST)
    assert not refused.promote
    assert refused.line().startswith("refuse (fail)")
    assert "nobody overrides this" in refused.line()


def test_an_override_is_no_approval() -> None:
    overridden = with_override(decide(evidence(compression_ratio=1.0), ASKING), AGAINST)
    waiting = with_approval(PACK, overridden, None, ASKING)
    assert (waiting.promote, waits(waiting), waiting.override) == (False, True, AGAINST)
    assert with_approval(PACK, overridden, answer(waiting), ASKING).promote
    assert not with_approval(PACK, overridden, answer(waiting, approved=False), ASKING).promote
    other = with_override(decide(evidence(compression_ratio=1.0), ASKING), AGAINST.model_copy(update={"by": "Ben"}))
    assert waits(with_approval(PACK, other, answer(waiting), ASKING)), "the answer was to another override"
