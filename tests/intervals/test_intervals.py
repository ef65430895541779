from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modelpress import intervals


@pytest.mark.parametrize(
    ("successes", "samples", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(successes: int, samples: int, low: float, high: float) -> None:
    found = intervals.wilson(successes, samples, 0.95)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 400), st.data())
def test_tango_ends_are_where_the_score_test_turns(samples: int, data: st.DataObject) -> None:
    gained = data.draw(st.integers(0, samples))
    lost = data.draw(st.integers(0, samples - gained))
    found = intervals.tango(gained, lost, samples, 0.95)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert found.value == (gained - lost) / samples
    for end in (found.low, found.high):
        if -1 + 1e-9 < end < 1 - 1e-9:
            assert abs(intervals._tango_statistic(end, gained, lost, samples)) == pytest.approx(1.959964, abs=1e-4)


def test_tango_mirrors() -> None:
    one, other = intervals.tango(12, 2, 100, 0.95), intervals.tango(2, 12, 100, 0.95)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))


def test_tango_without_discordance_still_leaves_room() -> None:
    found = intervals.tango(0, 0, 500, 0.95)
    z2 = 1.959964**2
    assert found.high == pytest.approx(z2 / (500 + z2), rel=1e-4)
    assert found.low == pytest.approx(-found.high)


@pytest.mark.parametrize(("up", "down", "samples"), [(0.02, 0.01, 500), (0.1, 0.05, 100), (0.01, 0.01, 1800)])
def test_tango_holds_its_level(up: float, down: float, samples: int) -> None:
    random = np.random.default_rng(0)
    tables = random.multinomial(samples, [up, down, 1 - up - down], size=400)
    covered = 0
    for gained, lost, _ in tables:
        found = intervals.tango(int(gained), int(lost), samples, 0.95)
        covered += found.low <= up - down <= found.high
    assert 0.91 <= covered / 400 <= 0.99


def test_the_bootstrap_holds_its_level_on_skewed_scores() -> None:
    random = np.random.default_rng(0)
    population = 1.0 / (1 + random.geometric(0.5, size=100_000))
    covered = 0
    for _ in range(200):
        found = intervals.bootstrap_mean(random.choice(population, 200), 0.9, resamples=1000)
        covered += found.low <= population.mean() <= found.high
    assert 0.83 <= covered / 200 <= 0.96


def test_the_bootstrap_is_close_to_the_normal_interval_and_repeats_itself() -> None:
    values = np.random.default_rng(1).random(2000)
    found = intervals.bootstrap_mean(values, 0.95)
    half = 1.96 * values.std() / 2000**0.5
    assert found.high - found.low == pytest.approx(2 * half, rel=0.06)
    assert found == intervals.bootstrap_mean(values, 0.95)
    assert found != intervals.bootstrap_mean(values, 0.95, seed=1)


def test_binary_scores_take_the_score_intervals() -> None:
    scores, baseline = np.array([1.0, 1, 0, 1, 0, 1]), np.array([1.0, 1, 1, 1, 0, 0])
    assert intervals.mean(scores, 0.9) == intervals.wilson(4, 6, 0.9)
    assert intervals.paired_difference(scores, baseline, 0.9) == intervals.tango(1, 1, 6, 0.9)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=60))
@example([(0.0, 0.0), (0.0, 1e-109)])
@example([(0.0, 0.0), (0.0, 5e-324)])
def test_a_paired_difference_contains_its_value_and_mirrors(pairs: list[tuple[float, float]]) -> None:
    scores, baseline = (np.array(column) for column in zip(*pairs, strict=True))
    found = intervals.paired_difference(scores, baseline, 0.95)
    assert found.low <= found.value <= found.high
    mirrored = intervals.paired_difference(baseline, scores, 0.95)
    assert mirrored.value == pytest.approx(-found.value)


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17:873-890, Table II, method 10
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((5, 56), (0, 29), -0.0381, 0.1926),
    ],
)
def test_the_difference_of_two_sets_has_the_published_interval(
    first: tuple[int, int], second: tuple[int, int], low: float, high: float
) -> None:
    one, two = (np.repeat([1.0, 0.0], [right, samples - right]) for right, samples in (first, second))
    found = intervals.difference(one, two, 0.95)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)
    mirrored = intervals.difference(two, one, 0.95)
    assert (mirrored.low, mirrored.high) == pytest.approx((-high, -low), abs=1e-4)


def test_scores_that_never_differ_are_not_taken_for_certainty() -> None:
    scores = np.linspace(0, 1, 50)
    found = intervals.paired_difference(scores, scores, 0.95)
    assert found.low < -0.05 < 0.05 < found.high


@pytest.mark.parametrize("scores", [np.array([0.5]), np.full(20, 0.5), np.full(20, 7.0)], ids=["one", "equal", "above"])
def test_equal_scores_and_single_ones_leave_as_much_open_as_their_number(scores: np.ndarray) -> None:
    found = intervals.paired_difference(scores, scores, 0.95)
    width = intervals.tango(0, 0, scores.size, 0.95).high * max(1.0, scores[0])
    assert (found.low, found.high) == pytest.approx((-width, width))
    alone = intervals.mean(scores, 0.95)
    assert alone.low < 0.95 * scores[0] < scores[0] == alone.value <= alone.high


def test_many_scores_are_as_the_bootstrap_has_them() -> None:
    """The floor under the width binds few and equal scores only: reciprocal ranks of 1000 queries are wider."""
    random = np.random.default_rng(0)
    scores, baseline = (1.0 / random.geometric(0.8, size=1000) for _ in range(2))
    assert intervals.mean(scores, 0.9) == intervals.bootstrap_mean(scores, 0.9)
    assert intervals.paired_difference(scores, baseline, 0.9) == intervals.bootstrap_mean(scores - baseline, 0.9)


def test_differences_that_show_their_scale_do_not_take_the_metric_s() -> None:
    """Log-likelihoods lie over many nats; two like models differ by hundredths in each sample."""
    random = np.random.default_rng(0)
    baseline = random.uniform(-9.0, -2.0, 400)
    found = intervals.paired_difference(baseline + random.normal(-0.003, 0.02, 400), baseline, 0.95)
    assert found.low < -0.003 < found.high
    assert found.high - found.low < 0.01


def test_few_changes_among_many_ties_take_the_metric_s_scale() -> None:
    baseline = np.random.default_rng(0).uniform(0.0, 1.0, 400)
    scores = baseline.copy()
    scores[:3] -= (0.01, 0.02, 0.03)
    found = intervals.paired_difference(scores, baseline, 0.95)
    assert found.high - found.low > 2 * intervals.tango(0, 0, 400, 0.95).high * 0.9


def test_more_samples_narrow_the_interval() -> None:
    scores = np.linspace(0, 1, 40)
    few = intervals.paired_difference(scores, scores[::-1], 0.95)
    many = intervals.paired_difference(np.tile(scores, 25), np.tile(scores[::-1], 25), 0.95)
    assert many.high - many.low < 0.3 * (few.high - few.low)


def test_needed_samples_of_the_known_case() -> None:
    # A 1-point drop at 3 % discordant answers, 95 % two-sided, 80 % power.
    assert intervals.needed_samples(0.03**0.5, 0.01, 0.95) == 2355
    assert intervals.needed_samples(0.0, 0.01, 0.95) == 1


@pytest.mark.parametrize("scores", [np.array([]), np.array([[1.0]]), np.array([1.0, np.nan])])
def test_scores_that_are_no_finite_vector_are_refused(scores: np.ndarray) -> None:
    with pytest.raises(ValueError, match="scores"):
        intervals.mean(scores, 0.95)


def test_unpaired_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="3 scores cannot be paired with 2"):
        intervals.paired_difference(np.ones(3), np.ones(2), 0.95)


@pytest.mark.parametrize("counts", [(3, 2), (-1, 2), (0, 0)])
def test_impossible_counts_are_refused(counts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="no share"):
        intervals.wilson(*counts, 0.95)
    with pytest.raises(ValueError, match="no paired table"):
        intervals.tango(counts[0], 0, counts[1], 0.95)
