"""Whatever a slice says: cut, ordered and bracketed in any way, all slices say what one process says."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable
from fractions import Fraction
from functools import partial, reduce

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from modelpress import intervals
from modelpress.reduce import (
    AnyPartial,
    ChannelMoments,
    Confusion,
    Extremes,
    Histogram,
    Moments,
    PairedScores,
    Partial,
    Ranking,
    WeightedMean,
)

READER: TypeAdapter[Partial] = TypeAdapter(AnyPartial)


def of_rows(rows: np.ndarray) -> dict[str, Partial]:
    """Everything that merges exactly, of (samples, 4): two numbers, a weight, a sample's number."""
    classes = (np.abs(rows[:, :2]) % 3).astype(np.int64)
    return {
        "mean": WeightedMean.of(rows[:, 0]),
        "weighted": WeightedMean.of(rows[:, 0], rows[:, 2]),
        "moments": Moments.of(rows[:, 0]),
        "extremes": Extremes.of(rows[:, :2]),
        "histogram": Histogram.of(rows[:, :2], 7, -10.0, 20.0),
        "confusion": Confusion.of(classes[:, 0], classes[:, 1], 3),
        "ranking": Ranking.of(classes[:, 0], within=(1, 2)),
        "paired": reduce(
            lambda one, two: one.merge(two),
            (PairedScores.of(int(row[3]), row[:1], row[1:2]) for row in rows),
            PairedScores(),
        ),
    }


@st.composite
def samples(draw: st.DrawFn) -> np.ndarray:
    number = st.floats(-100, 100) | st.sampled_from([0.0, -0.0, 1e-300, 1.0, 20.0, -10.0])
    rows = draw(st.lists(st.tuples(number, number, st.floats(0, 10)), min_size=1, max_size=25))
    return np.array([(*row, place) for place, row in enumerate(rows)])


@given(samples(), st.randoms(use_true_random=False), st.integers(1, 5))
def test_any_cut_order_and_bracket_is_the_one_process_result(
    rows: np.ndarray, chance: random.Random, parts: int
) -> None:
    order = list(range(len(rows)))
    chance.shuffle(order)
    pieces = [of_rows(rows[order[part::parts]]) for part in range(parts)]
    for name, whole in of_rows(rows).items():
        left = [piece[name] for piece in pieces]
        while len(left) > 1:  # merge any two, either way round
            chance.shuffle(left)
            one, two = left.pop(), left.pop()
            left.append(READER.validate_json(READER.dump_json(one.merge(two))))
        assert READER.dump_json(left[0]) == READER.dump_json(whole), name


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=50))
def test_moments_are_those_of_the_standard_library(values: list[float]) -> None:
    found = Moments.of(values)
    assert found.mean() == float(statistics.mean(map(Fraction, values)))
    assert found.variance() == float(statistics.pvariance(list(map(Fraction, values))))
    assert found.variance(unbiased=True) == float(statistics.variance(list(map(Fraction, values))))


def test_a_variance_does_not_cancel() -> None:
    assert Moments.of([1e9 + 1, 1e9 + 2, 1e9 + 3]).variance(unbiased=True) == 1.0


def test_a_weighted_mean_weighs() -> None:
    assert WeightedMean.of([1.0, 4.0], [3, 1]).mean() == 1.75
    assert WeightedMean.of([0.1] * 10).mean() == 0.1


@given(
    st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(1e5, 1e5 + 1)), min_size=1, max_size=60),
    st.randoms(use_true_random=False),
    st.integers(1, 8),
)
@example([(0.0, 1e5), (3.225178016705816e-198, 1e5)], random.Random(0), 1)
def test_channel_moments_stay_within_their_bound(
    rows: list[tuple[float, float]], chance: random.Random, parts: int
) -> None:
    chance.shuffle(rows)
    pieces = [ChannelMoments.of(np.array(rows[part::parts]).reshape(-1, 2)) for part in range(parts)]
    found = reduce(lambda one, two: one.merge(two), pieces)
    assert found.count == len(rows)
    for channel in range(2):
        values = [Fraction(row[channel]) for row in rows]
        mean = sum(values, Fraction(0)) / len(rows)
        square = float(sum((value * value for value in values), Fraction(0)))
        off = abs(Fraction(found.deviations[channel]) - sum(((value - mean) ** 2 for value in values), Fraction(0)))
        square += len(rows) * np.finfo(np.float64).tiny / found.bound(parts)  # numbers below 1e-154 have no square
        assert off <= found.bound(parts) * square
        assert abs(Fraction(found.means[channel]) - mean) <= found.bound(parts) * math.sqrt(square / len(rows))


@given(st.lists(st.floats(-5, 5), max_size=30), st.lists(st.floats(-5, 5), max_size=30))
def test_channel_moments_take_either_first(some: list[float], others: list[float]) -> None:
    one, two = (ChannelMoments.of(np.array(values).reshape(-1, 1)) for values in (some, others))
    assert one.merge(two) == two.merge(one)


def test_a_histogram_counts_as_numpy_does() -> None:
    values = np.array([-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, np.nan, np.inf])
    found = Histogram.of(values, 4, 0.0, 2.0)
    assert found.counts == np.histogram(values[:6], 4, (0.0, 2.0))[0].tolist()
    assert found.outside == 3


def test_extremes_keep_what_is_not_finite_through_json() -> None:
    found = Extremes.of([[1.0, 2.0], [math.nan, -math.inf]])
    again = READER.validate_json(READER.dump_json(found.merge(Extremes.of([[0.0, 0.0]]))))
    assert isinstance(again, Extremes)
    assert math.isnan(again.lows[0])
    assert math.isnan(again.highs[0])
    assert (again.lows[1], again.highs[1]) == (-math.inf, 2.0)
    assert READER.validate_json(READER.dump_json(Extremes.of(np.zeros((0, 2))))) == Extremes.of(np.zeros((0, 2)))


def test_a_confusion_says_shares() -> None:
    found = Confusion.of([0, 0, 0, 1, 2], [0, 0, 1, 1, 1], 4)
    assert found.accuracy() == 0.6
    assert (found.recall(0), found.recall(1), found.recall(2), found.recall(3)) == (2 / 3, 1.0, 0.0, None)
    assert (found.precision(0), found.precision(1), found.precision(3)) == (1.0, 1 / 3, None)


def test_a_ranking_says_shares() -> None:
    found = Ranking.of([1, 2, 0, 10], within=(1, 5, 10))
    assert (found.top(1), found.top(5), found.top(10)) == (0.25, 0.5, 0.75)
    assert found.mean_reciprocal_rank() == pytest.approx(1.6 / 4)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=40), st.integers(1, 5))
def test_paired_scores_give_the_same_interval(pairs: list[tuple[float, float]], parts: int) -> None:
    """Slices of neighbours that come last first."""
    scores, baseline = np.array(pairs).T
    ends = [len(pairs) * part // parts for part in range(parts + 1)]
    pieces = [PairedScores.of(a, scores[a:b], baseline[a:b]) for a, b in itertools.pairwise(ends)]
    mine, other = reduce(lambda one, two: one.merge(two), reversed(pieces)).vectors()
    assert other is not None
    assert mine.tobytes() == scores.tobytes()
    assert intervals.paired_difference(mine, other, 0.95) == intervals.paired_difference(scores, baseline, 0.95)


REFUSED: dict[str, Callable[[], object]] = {
    "other bins": lambda: Histogram.of([1], 4, 0, 1).merge(Histogram.of([1], 5, 0, 1)),
    "other ends": lambda: Histogram.of([1], 4, 0, 1).merge(Histogram.of([1], 4, 0, 2)),
    "other classes": lambda: Confusion.of([0], [0], 2).merge(Confusion.of([0], [0], 3)),
    "other channels": lambda: Extremes.of([[1.0]]).merge(Extremes.of([[1.0, 2.0]])),
    "other means": lambda: ChannelMoments.of([[1.0]]).merge(ChannelMoments.of([[1.0, 2.0]])),
    "other k": lambda: Ranking.of([1], (1,)).merge(Ranking.of([1], (2,))),
    "one sample twice": lambda: PairedScores.of(0, [1.0]).merge(PairedScores.of(0, [1.0])),
    "unpaired": lambda: PairedScores.of(0, [1.0], [1.0]).merge(PairedScores.of(1, [1.0])),
    "a gap": lambda: PairedScores.of(0, [1.0]).merge(PairedScores.of(2, [1.0])).vectors(),
    "a class too many": lambda: Confusion.of([0], [2], 2),
    "answers missing": lambda: Confusion.of([0, 1], [1], 2),
    "NaN": lambda: Moments.of([math.nan]),
    "NaN in a channel": lambda: ChannelMoments.of([[math.nan]]),
    "a negative weight": lambda: WeightedMean.of([1.0], [-1.0]),
    "weights missing": lambda: WeightedMean.of([1.0, 2.0], [1.0]),
    "a mean of nothing": WeightedMean().mean,
    "moments of nothing": Moments().mean,
    "a variance of one": partial(Moments.of([1.0]).variance, unbiased=True),
    "an accuracy of nothing": Confusion(classes=2).accuracy,
    "a negative rank": lambda: Ranking.of([-1]),
    "a k that was not counted": partial(Ranking.of([1]).top, 3),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        REFUSED[case]()


@pytest.mark.parametrize(
    "text",
    [
        '{"kind": "histogram", "low": 0, "high": 1, "counts": [-1]}',
        '{"kind": "histogram", "low": 1, "high": 0, "counts": [1]}',
        '{"kind": "histogram", "low": 0, "high": "Infinity", "counts": [1]}',
        '{"kind": "confusion", "classes": 2, "cells": {"4": 1}}',
        '{"kind": "paired-scores", "scores": {"0": 1}, "baseline": {"1": 1}}',
        '{"kind": "weighted-mean", "total": {"mantissa": "10", "exponent": 0}}',
        '{"kind": "weighted-mean", "extra": 1}',
        '{"kind": "other"}',
    ],
)
def test_a_lying_partial_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        READER.validate_json(text)
