"""What several comparisons say together: further metrics, slices, equivalence, and how often they are wrong."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpress.config import GateConfig
from modelpress.reports import Check
from modelpress.scores import Scored
from registry.gates.comparisons import OTHER_SAMPLES, compare, holm

N = 2_000
GATE = GateConfig(margin=0.01)


def scored(
    wrong: int = 40,
    *,
    first: int = 0,
    samples: int = N,
    further: dict[str, np.ndarray] | None = None,
    slices: dict[str, np.ndarray] | None = None,
    of: str = "these",
) -> Scored:
    """0/1 scores with `wrong` wrong answers from sample `first` on."""
    vector = np.ones(samples)
    vector[first : first + wrong] = 0
    return Scored(vector, of, "accuracy", further or {}, slices or {})


def against_source(candidate: Scored, source: Scored, gate: GateConfig = GATE) -> dict[str, Check]:
    return {check.name: check for check in compare(candidate, [("the source", source)], gate)}


def gate(**changes: object) -> GateConfig:
    return GateConfig.model_validate({"margin": 0.01} | changes)


# ---- further metrics


F1 = gate(further_margins={"f1": 0.02})


def f1(level: float) -> dict[str, np.ndarray]:
    return {"f1": np.linspace(level - 0.1, level + 0.1, N)}


def test_a_further_metric_is_judged_by_its_own_margin() -> None:
    source = scored(further=f1(0.8))
    assert against_source(scored(further=f1(0.8)), source, F1)["f1 against the source"].verdict == "pass"
    assert against_source(scored(further=f1(0.7)), source, F1)["f1 against the source"].verdict == "fail"
    assert "f1 against the source" not in against_source(scored(further=f1(0.7)), source, GATE)


def test_metrics_that_disagree_do_not_make_up_for_each_other() -> None:
    """Far better by the one and worse by the other is refused by the other."""
    found = against_source(scored(0, further=f1(0.7)), scored(200, further=f1(0.8)), F1)
    assert found["quality against the source"].verdict == "pass"
    assert found["f1 against the source"].verdict == "fail"


def test_a_metric_that_the_workload_lacks_fails_by_name() -> None:
    found = against_source(scored(), scored(), F1)["f1 against the source"]
    assert (found.verdict, found.reason) == ("fail", "f1 of the candidate was not measured")


def test_a_champion_from_before_a_metric_is_inconclusive_with_the_way_out() -> None:
    (_, found) = compare(scored(further=f1(0.8)), [("the champion", scored())], F1)
    assert (found.name, found.verdict) == ("f1 against the champion", "inconclusive")
    assert "published before f1 was measured" in found.reason
    assert "run the reference's recipe again" in found.reason


def test_a_nan_in_a_further_metric_fails() -> None:
    broken = f1(0.8)
    broken["f1"][3] = math.nan
    found = against_source(scored(further=broken), scored(further=f1(0.8)), F1)["f1 against the source"]
    assert (found.verdict, found.reason) == ("fail", "1 of 2000 f1 scores of the candidate are not finite")


# ---- slices


HALVES = {"left": np.arange(N) < N // 2, "right": np.arange(N) >= N // 2}
SLICED = gate(slice_margin=0.03)


def test_a_slice_that_suffers_is_found_though_the_whole_is_well() -> None:
    source, candidate = scored(100, slices=HALVES), scored(100, first=1_000, slices=HALVES)
    found = against_source(candidate, source, SLICED)
    assert found["quality against the source"].verdict != "fail"
    assert found["slice left against the source"].verdict == "pass"
    assert found["slice right against the source"].verdict == "fail"


def test_slices_are_judged_only_where_they_are_asked_about() -> None:
    assert set(against_source(scored(slices=HALVES), scored(), GATE)) == {"quality against the source"}


def test_a_slice_margin_without_slices_fails() -> None:
    found = against_source(scored(), scored(), SLICED)["slices against the source"]
    assert (found.verdict, "the workload names none" in found.reason) == ("fail", True)


def test_an_empty_slice_and_a_slice_of_one_tell_nothing() -> None:
    masks = {"empty": np.zeros(N, bool), "one": np.arange(N) == N - 1}
    found = against_source(scored(slices=masks), scored(slices=masks), SLICED)
    assert found["slice empty against the source"].reason == "no sample is in it, on one side or both"
    one = found["slice one against the source"]
    assert (found["slice empty against the source"].verdict, one.verdict) == ("inconclusive", "inconclusive")
    assert one.required_samples is not None
    assert one.required_samples > 1


@pytest.mark.parametrize(
    ("floor", "verdict"), [(0.85, "pass"), (0.899, "inconclusive"), (0.95, "fail"), (math.nextafter(1, 0), "fail")]
)
def test_a_floor_is_held_by_the_whole_interval(floor: float, verdict: str) -> None:
    candidate = scored(100, slices=HALVES)  # 0.9 on the left
    found = against_source(candidate, scored(100), gate(slice_floors={"left": floor}))["slice left"]
    assert found.verdict == verdict
    assert "accuracy 0.9000 [" in found.reason


@pytest.mark.parametrize(
    ("candidate", "verdict", "said"),
    [
        (scored(slices=HALVES), "fail", "no such slice; there are: left, right"),
        (scored(), "fail", "no such slice; there are: none"),
        (scored(slices={"night": np.zeros(N, bool)}), "inconclusive", "no sample is in it"),
        (Scored(None, "these", "accuracy", {}, {"night": np.ones(N, bool)}), "fail", "was not measured"),
    ],
)
def test_a_floor_without_scores_says_what_is_missing(candidate: Scored, verdict: str, said: str) -> None:
    found = against_source(candidate, scored(), gate(slice_floors={"night": 0.5}))["slice night"]
    assert found.verdict == verdict
    assert said in found.reason


def test_slices_of_other_samples_are_compared_as_means_where_that_is_asked() -> None:
    other = scored(400, samples=1_500, of="others", slices={"left": np.arange(1_500) < 700})
    candidate = scored(40, slices={"left": HALVES["left"]})
    paired = compare(candidate, [("its publication", other)], SLICED)
    assert {check.reason for check in paired} == {OTHER_SAMPLES}
    unpaired = compare(candidate, [("its publication", other)], SLICED, unpaired=True)
    assert [check.verdict for check in unpaired] == ["pass", "pass"]
    assert "on 1000 samples against 700 others" in unpaired[1].reason
    without = compare(candidate, [("its publication", replace(other, slices={}))], SLICED, unpaired=True)
    assert without[1].verdict == "inconclusive"


# ---- equivalence


SAME = gate(equivalence=True)


@pytest.mark.parametrize(
    ("candidate", "source", "verdict"),
    [(40, 40, "pass"), (140, 40, "fail"), (40, 140, "fail"), (40, 60, "inconclusive"), (60, 40, "inconclusive")],
)
def test_equivalence_refuses_what_is_better_as_well_as_what_is_worse(candidate: int, source: int, verdict: str) -> None:
    found = against_source(scored(candidate), scored(source), SAME)["quality against the source"]
    assert found.verdict == verdict
    assert "equivalence margin 0.01" in found.reason
    plain = against_source(scored(candidate), scored(source))["quality against the source"]
    assert plain.verdict == ("pass" if candidate <= source else verdict)


def test_a_candidate_may_be_better_than_the_champion_under_equivalence() -> None:
    checks = compare(scored(40), [("the source", scored(40)), ("the champion", scored(140))], SAME)
    assert [check.verdict for check in checks] == ["pass", "pass"]


# ---- Holm


@given(st.lists(st.floats(0, 1), max_size=8), st.floats(0.001, 0.5))
def test_holm_is_the_textbooks(p_values: list[float], level: float) -> None:
    expected: set[int] = set()
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    for rank, number in enumerate(order):
        if p_values[number] > level / (len(p_values) - rank):
            break
        expected.add(number)
    found = holm(len(p_values), level, lambda at: frozenset(n for n, p in enumerate(p_values) if p <= at))
    assert found == expected


def test_what_fails_alone_and_not_among_all_is_inconclusive_and_asks_for_samples() -> None:
    margin = gate(margin=0.01)
    alone = against_source(scored(37, samples=1_500), scored(14, samples=1_500), margin)["quality against the source"]
    assert alone.verdict == "fail"
    names = [f"s{number}" for number in range(8)]
    masks = {name: np.arange(1_500) < 1_500 for name in names}
    floors = gate(margin=0.01, slice_floors=dict.fromkeys(names, 0.5))
    among = against_source(scored(37, samples=1_500, slices=masks), scored(14, samples=1_500), floors)
    found = among["quality against the source"]
    assert found.verdict == "inconclusive"
    assert "too little to fail by, among 9 comparisons" in found.reason
    assert found.required_samples is not None
    assert found.required_samples > 1_500


def pairs(generator: np.random.Generator, loss: float, samples: int, disagree: float = 0.08) -> tuple[Scored, Scored]:
    """A candidate and a source whose true difference is −loss; on a share of `disagree` one alone is right."""
    kinds = generator.choice(3, samples, p=[(disagree - loss) / 2, (disagree + loss) / 2, 1 - disagree])
    candidate, source = np.where(kinds == 0, 1.0, np.where(kinds == 1, 0.0, 1.0)), np.where(kinds == 0, 0.0, 1.0)
    return Scored(candidate, "these", "accuracy"), Scored(source, "these", "accuracy")


def share(verdicts: list[str], wanted: str) -> float:
    return verdicts.count(wanted) / len(verdicts)


TRIALS = 600
ROOM = 3 * math.sqrt(0.05 * 0.95 / TRIALS)
"""Three standard deviations of a share of 5 %."""


def test_a_candidate_at_the_margin_passes_no_oftener_than_the_level() -> None:
    generator = np.random.default_rng(1)
    verdicts = []
    for _ in range(TRIALS):
        candidate, source = pairs(generator, 0.02, 400)
        verdicts += [check.verdict for check in compare(candidate, [("the source", source)], gate(margin=0.02))]
    assert 0.02 < share(verdicts, "pass") < 0.05 + ROOM
    assert 0.02 < share(verdicts, "fail") < 0.05 + ROOM


def test_passing_all_is_no_likelier_to_be_wrong_than_passing_one() -> None:
    """One of three is at the margin, the others are well: all three pass at most as often as that one does."""
    generator = np.random.default_rng(2)
    asked, passed = gate(margin=0.02, further_margins={"b": 0.02, "c": 0.02}), 0
    for _ in range(TRIALS):
        parts = [pairs(generator, loss, 400) for loss in (0.0, 0.02, -0.02)]
        candidate, source = (
            replace(parts[0][side], further={"b": parts[1][side].scores, "c": parts[2][side].scores}) for side in (0, 1)
        )
        passed += all(check.verdict == "pass" for check in compare(candidate, [("the source", source)], asked))
    assert passed / TRIALS < 0.05 + ROOM


def test_a_false_claim_of_failure_among_many_is_no_likelier_than_the_level() -> None:
    """Five metrics exactly at the margin, which is no failure: uncorrected, a fifth of the decisions would fail."""
    generator = np.random.default_rng(3)
    names = ["b", "c", "d", "e"]
    asked, failed, alone = gate(margin=0.02, further_margins=dict.fromkeys(names, 0.02)), 0, 0
    for _ in range(TRIALS):
        parts = [pairs(generator, 0.02, 400) for _ in range(5)]
        candidate, source = (
            replace(
                parts[0][side], further={name: part[side].scores for name, part in zip(names, parts[1:], strict=True)}
            )
            for side in (0, 1)
        )
        checks = compare(candidate, [("the source", source)], asked)
        failed += any(check.verdict == "fail" for check in checks)
        alone += any(check.verdict == "fail" or "too little to fail by" in check.reason for check in checks)
    assert failed / TRIALS < 0.05 + ROOM
    assert alone / TRIALS > 0.1, "the correction had something to do"


@given(
    samples=st.integers(1, 60),
    gained=st.integers(0, 60),
    lost=st.integers(0, 60),
    margin=st.floats(0.005, 0.3),
    confidence=st.floats(0.6, 0.999),
)
def test_any_scores_give_a_verdict_and_only_doubt_asks_for_samples(
    samples: int, gained: int, lost: int, margin: float, confidence: float
) -> None:
    candidate, source = np.ones(samples), np.ones(samples)
    candidate[: min(lost, samples)] = 0
    source[max(0, samples - gained) :] = 0
    ours, theirs = Scored(candidate, "these", "accuracy"), Scored(source, "these", "accuracy")
    (found,) = compare(ours, [("the source", theirs)], gate(margin=margin, confidence=confidence))
    assert found.verdict in ("pass", "fail", "inconclusive")
    assert found.required_samples is None or (found.verdict == "inconclusive" and found.required_samples > samples)


def test_a_single_sample_decides_nothing() -> None:
    for ours, theirs in ((0.0, 1.0), (1.0, 0.0), (1.0, 1.0)):
        (found,) = compare(
            Scored(np.array([ours]), "one", "accuracy"),
            [("the source", Scored(np.array([theirs]), "one", "accuracy"))],
            GATE,
        )
        assert found.verdict == "inconclusive"
