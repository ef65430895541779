"""K-means in one dimension: the values that a codebook holds.

On a line the best clusters are runs of the sorted values, so that dynamic programming finds the best centroids for
certain (Wang and Song 2011, doi:10.32614/RJ-2011-015), which Lloyd's steps from any start do not. Its cost grows with
the square of the number of distinct values; more than `EXACT_VALUES` of them are put into that many bins for it, and
Lloyd's steps on all values finish.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]

EXACT_VALUES = 1024
"""Distinct values up to which the centroids are the best there are."""
_LLOYD_STEPS = 100


def best_centroids(values: npt.NDArray[np.float32], count: int) -> Doubles:
    """At most `count` centroids of least Σ (value − nearest centroid)².

    Args:
        values: (n,), finite, at least one.
        count: of centroids, 1 or more. Fewer come back where there are fewer distinct values.

    Returns:
        (centroids,), rising.
    """
    distinct, counts = np.unique(values.astype(np.float64), return_counts=True)
    masses = counts.astype(np.float64)
    if distinct.size <= count:
        return distinct
    if distinct.size <= EXACT_VALUES:
        return _exact(distinct, masses, count)
    edges = _edges(distinct, masses)
    sums = np.add.reduceat(distinct * masses, edges)
    binned = np.add.reduceat(masses, edges)
    return _lloyd(distinct, masses, _exact(sums / binned, binned, count))


def nearest(values: npt.NDArray[np.float32], centroids: Doubles) -> npt.NDArray[np.int64]:
    """Index of the nearest of rising `centroids` for each value, the lower one where two are as near."""
    return np.searchsorted((centroids[1:] + centroids[:-1]) / 2, values.astype(np.float64))


def _exact(values: Doubles, masses: Doubles, count: int) -> Doubles:
    """Centroids of the cheapest cut of rising `values` into `count` runs."""
    size = values.size
    if size <= count:
        return values
    shift = float(np.average(values, weights=masses))
    centred = values - shift  # sums of squares far from 0 would lose the digits that matter
    mass = np.concatenate([[0.0], np.cumsum(masses)])
    first = np.concatenate([[0.0], np.cumsum(masses * centred)])
    second = np.concatenate([[0.0], np.cumsum(masses * centred**2)])
    total = mass[None, 1:] - mass[:-1, None]
    # run[i, j]: the cost of one run of the values i to j; infinite where j < i.
    run = second[None, 1:] - second[:-1, None]
    total[np.tril_indices(size, -1)] = 1.0
    run -= (first[None, 1:] - first[:-1, None]) ** 2 / total
    run[np.tril_indices(size, -1)] = np.inf
    np.maximum(run, 0.0, out=run)
    cost = run[0]
    starts = np.zeros((count, size), np.int64)
    for runs in range(1, count):
        # A run that begins at i comes after the cheapest cut of the values before i into one run less.
        tried = run[1:] + cost[:-1, None]
        best = tried.argmin(axis=0)
        starts[runs], cost = best + 1, tried[best, np.arange(size)]
    bounds = [size]
    for runs in range(count - 1, -1, -1):
        bounds.append(int(starts[runs, bounds[-1] - 1]))
    cuts = np.array(bounds[::-1])
    centroids: Doubles = np.diff(first[cuts]) / np.diff(mass[cuts]) + shift
    return centroids


def _edges(values: Doubles, masses: Doubles) -> npt.NDArray[np.int64]:
    """First places of bins: half of them of equal width, so that tails are kept apart, half of equal mass."""
    even = np.searchsorted(values, np.linspace(values[0], values[-1], EXACT_VALUES // 2, endpoint=False))
    shares = np.cumsum(masses) / masses.sum()
    heavy = np.searchsorted(shares, np.linspace(0, 1, EXACT_VALUES // 2, endpoint=False)[1:])
    return np.unique(np.concatenate([[0], even, np.minimum(heavy, values.size - 1)]))


def _lloyd(values: Doubles, masses: Doubles, centroids: Doubles) -> Doubles:
    """Lloyd's steps on rising values: cut at the middle between two centroids, move each to its run's mean."""
    mass = np.concatenate([[0.0], np.cumsum(masses)])
    sums = np.concatenate([[0.0], np.cumsum(values * masses)])
    for _ in range(_LLOYD_STEPS):
        inner = np.searchsorted(values, (centroids[1:] + centroids[:-1]) / 2)
        cuts = np.concatenate([[0], inner, [values.size]])
        masses_of = np.diff(mass[cuts])
        moved = np.divide(np.diff(sums[cuts]), masses_of, out=centroids.copy(), where=masses_of > 0)
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    return np.sort(centroids)
