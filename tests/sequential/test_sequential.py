"""Evidence that may be looked at all the time: its errors by simulation, its power, and counts alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpress import sequential
from modelpress.sequential import Arms, Counts

ALPHA = 0.05
PATHS = 200
LOOKS = range(40, 2001, 40)
LIMIT = ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / PATHS)
"""What a share of `PATHS` exceeds once in a thousand times where the chance is `ALPHA`; the seeds are fixed."""

Outcomes = np.ndarray


def ever(outcomes: Outcomes, alarm: Callable[[Counts], bool]) -> float:
    """Share of the rows on which an alarm is raised at any of the looks."""
    sums = outcomes.cumsum(axis=1)
    return float(np.mean([any(alarm(Counts(look, row[look - 1])) for look in LOOKS) for row in sums]))


def drawn(rate: float, seed: int) -> Outcomes:
    return np.random.default_rng(seed).random((PATHS, LOOKS[-1])) < rate


@pytest.mark.parametrize("bound", [0.01, 0.1, 0.5])
def test_at_the_bound_a_false_alarm_is_as_rare_as_stated_over_all_looks(bound: float) -> None:
    assert ever(drawn(bound, 1), lambda seen: sequential.rate(seen, bound).alarms(ALPHA)) <= LIMIT
    assert ever(drawn(bound, 2), lambda seen: sequential.rate(seen, bound).clears(ALPHA)) <= LIMIT


def test_the_simulation_would_see_a_test_for_one_look_that_is_taken_at_all() -> None:
    def fixed(seen: Counts) -> bool:
        return (seen.hits - seen.trials * 0.1) / math.sqrt(seen.trials * 0.1 * 0.9) > 1.645

    assert ever(drawn(0.1, 1), fixed) > 2 * LIMIT


def test_outcomes_between_0_and_1_and_rates_that_drift_below_the_bound_raise_no_more() -> None:
    generator = np.random.default_rng(3)
    shares = generator.beta(0.2, 1.8, (PATHS, LOOKS[-1]))  # of mean 0.1
    assert ever(shares, lambda seen: sequential.rate(seen, 0.1).alarms(ALPHA)) <= LIMIT
    drifting = generator.random(shares.shape) < 0.05 + 0.05 * np.sin(np.arange(LOOKS[-1]) / 100)
    assert ever(drifting, lambda seen: sequential.rate(seen, 0.1).alarms(ALPHA)) <= LIMIT


def dealt(champion: Outcomes, candidate: Outcomes, share: float, generator: np.random.Generator) -> list[list[Arms]]:
    """At each look of each row, what the two arms saw: rates may differ from request to request."""
    coin = generator.random((PATHS, LOOKS[-1])) < share
    rows = []
    hit = {True: generator.random(coin.shape) < candidate, False: generator.random(coin.shape) < champion}
    for row in range(PATHS):
        mine, others = (coin[row] & hit[True][row]).cumsum(), (~coin[row] & hit[False][row]).cumsum()
        trials = coin[row].cumsum()
        rows.append(
            [
                Arms(share, Counts(at - trials[at - 1], others[at - 1]), Counts(trials[at - 1], mine[at - 1]))
                for at in LOOKS
            ]
        )
    return rows


def outage() -> Outcomes:
    """A rate of errors that jumps for both alike, as in an overload."""
    rates = np.full(LOOKS[-1], 0.02)
    rates[500:900] = 0.6
    return rates


@pytest.mark.parametrize("share", [0.05, 0.5])
@pytest.mark.parametrize(("ratio", "base"), [(1.0, np.full(LOOKS[-1], 0.05)), (1.5, outage()), (1.0, outage())])
def test_a_candidate_at_the_ratio_is_stopped_as_rarely_as_stated(share: float, ratio: float, base: Outcomes) -> None:
    rows = dealt(base, ratio * base, share, np.random.default_rng(4))
    floor = 1e-6  # so that the ratio alone decides
    alarms = [any(sequential.excess([at], ratio, floor).alarms(ALPHA) for at in row) for row in rows]
    assert np.mean(alarms) <= LIMIT
    clears = [any(sequential.excess([at], ratio, floor).clears(ALPHA) for at in row) for row in rows]
    assert np.mean(clears) <= LIMIT


def test_a_worse_candidate_is_found_out_and_an_equal_one_is_cleared() -> None:
    base = np.full(LOOKS[-1], 0.02)
    generator = np.random.default_rng(5)
    worse = dealt(base, np.full(LOOKS[-1], 0.15), 0.25, generator)
    assert np.mean([sequential.excess([row[-1]], 1.5, 0.01).alarms(ALPHA) for row in worse]) > 0.95
    clean = dealt(base * 0, base * 0, 0.5, generator)
    assert all(sequential.excess([row[-1]], 1.5, 0.01).clears(ALPHA) for row in clean), "no error in 1000 requests"


def test_few_errors_under_the_floor_are_no_alarm_though_the_champion_has_none() -> None:
    seen = [Arms(0.05, Counts(190_000, 0), Counts(10_000, 20))]
    assert sequential.excess(seen, 1.5, 1e-6).alarms(1e-6)
    assert not sequential.excess(seen, 1.5, 0.01).alarms(ALPHA)
    assert sequential.excess(seen, 1.5, 0.01).clears(ALPHA)


def test_a_candidate_that_always_fails_is_stopped_after_a_handful_of_requests() -> None:
    def stopped(n: int) -> bool:
        return sequential.excess([Arms(0.05, Counts(19 * n), Counts(n, n))], 1.5, 0.01).alarms(1e-4)

    needed = next(n for n in range(1, 100) if stopped(n))
    assert needed <= 6


counts = st.integers(0, 10_000).flatmap(lambda n: st.integers(0, n).map(lambda hits: Counts(n, hits)))


@given(counts, counts, st.floats(0.001, 0.999))
def test_evidence_knows_totals_alone(one: Counts, other: Counts, bound: float) -> None:
    """So counts of two servers add up, whichever comes first; in `excess` those of one share do."""
    assert one + other == other + one
    together = sequential.rate(one + other, bound)
    assert math.isfinite(together.above)
    assert math.isfinite(together.below)
    apart = [Arms(0.3, one, other), Arms(0.3, other, one)]
    joined = [Arms(0.3, one + other, other + one)]
    assert sequential.excess(apart, 2.0, bound).above == pytest.approx(sequential.excess(joined, 2.0, bound).above)


@given(counts, st.floats(0.01, 0.99))
def test_evidence_is_never_for_both_sides(seen: Counts, bound: float) -> None:
    found = sequential.rate(seen, bound)
    assert min(found.above, found.below) <= 0.0


@settings(max_examples=50)
@given(counts, st.sampled_from([0.2, 0.05, 1e-4]))
def test_an_interval_holds_the_rates_that_evidence_does_not_refute(seen: Counts, alpha: float) -> None:
    low, high = sequential.interval(seen, alpha)
    assert 0 <= low <= high <= 1
    if seen.rate is not None:
        assert low <= seen.rate <= high
    for bound, inside in ((low * 0.9, False), (high + (1 - high) * 0.1, False), ((low + high) / 2, True)):
        if 1e-9 < bound < 1 - 1e-9 and bound not in (low, high):
            found = sequential.rate(seen, bound)
            assert (found.alarms(alpha / 2) or found.clears(alpha / 2)) != inside


def test_nothing_seen_says_nothing() -> None:
    assert sequential.rate(Counts(), 0.5).above == pytest.approx(0.0)
    assert sequential.excess([], 1.5, 0.01).above == pytest.approx(0.0)
    assert sequential.interval(Counts(), 0.05) == (0.0, 1.0)


@pytest.mark.parametrize("counts", [(1, 2), (-1, 0), (2, -1), (math.inf, 0), (math.nan, 0), (1, math.nan)])
def test_impossible_counts_are_refused(counts: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="no counts"):
        Counts(*counts)


@pytest.mark.parametrize("bound", [0.0, 1.0, -0.1, math.nan])
def test_impossible_bounds_are_refused(bound: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        sequential.rate(Counts(1, 1), bound)
    with pytest.raises(ValueError, match="1 or more"):
        sequential.excess([], 0.5, 0.01)
