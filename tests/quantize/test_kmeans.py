"""One-dimensional k-means: the best centroids where they can be found for certain, good ones everywhere."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpress.quantize.kmeans import EXACT_VALUES, best_centroids, nearest


def cost(values: np.ndarray, centroids: np.ndarray) -> float:
    return float(np.square(values[:, None] - centroids).min(axis=1).sum())


def brute_force(values: np.ndarray, count: int) -> float:
    """Least cost over every cut of the sorted values into at most `count` runs."""
    values = np.sort(values)
    least = np.inf
    for runs in range(1, min(count, values.size) + 1):
        for cuts in itertools.combinations(range(1, values.size), runs - 1):
            parts = [values[slice(*pair)] for pair in itertools.pairwise([0, *cuts, values.size])]
            least = min(least, float(sum(np.square(part - part.mean()).sum() for part in parts)))
    return least


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.integers(-30, 30), min_size=1, max_size=9),
    scale=st.sampled_from([1e-6, 0.37, 1e4]),
    shift=st.sampled_from([0.0, 1000.0]),
    count=st.integers(1, 5),
)
def test_nothing_is_better_on_few_values(values: list[int], scale: float, shift: float, count: int) -> None:
    array = ((np.array(values) + shift) * scale).astype(np.float32)
    centroids = best_centroids(array, count)
    assert 1 <= centroids.size <= count
    assert (np.diff(centroids) > 0).all()
    exact = array.astype(np.float64)
    assert cost(exact, centroids) <= brute_force(exact, count) * (1 + 1e-9) + 1e-12 * scale**2


@pytest.mark.parametrize("count", [3, 15, 31])
def test_many_values_reach_the_known_distortion_of_a_normal_distribution(count: int) -> None:
    """Max 1960 (doi:10.1109/TIT.1960.1057548), table I, gives 0.1902, 0.01073 (15), and 0.002658 (31)."""
    values = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    assert np.unique(values).size > EXACT_VALUES
    centroids = best_centroids(values, count)
    error = np.square(values - centroids[nearest(values, centroids)]).mean()
    assert error == pytest.approx({3: 0.1902, 15: 0.01073, 31: 0.002658}[count], rel=0.03)


def test_an_outlier_gets_a_centroid_of_its_own_and_spoils_no_other() -> None:
    values = np.random.default_rng(0).standard_normal(5_000).astype(np.float32)
    alone = best_centroids(values, 7)
    together = best_centroids(np.append(values, np.float32(1e4)), 8)
    assert together[-1] == 1e4
    spread = [np.square(values - found[nearest(values, found)]).mean() for found in (alone, together[:-1])]
    assert spread[1] == pytest.approx(spread[0], rel=1e-3)


def test_nearest_is_nearest() -> None:
    values = np.random.default_rng(1).standard_normal(1_000).astype(np.float32)
    centroids = np.array([-1.0, 0.25, 0.5, 3.0])
    expected = np.abs(values.astype(np.float64)[:, None] - centroids).argmin(axis=1)
    assert np.array_equal(nearest(values, centroids), expected)
