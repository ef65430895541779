"""Ranges of activations of least squared rounding error, from histograms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from modelpress.quantize.observe import Inputs, observe
from modelpress.reduce import ByName, Extremes, Histogram

LEVELS = 255
"""Steps of an 8-bit range."""

BINS = 2048
"""Of a histogram of activations."""
_SHARES = np.linspace(0.02, 1.0, 50)
"""Candidates for each end of the range, as shares of the extreme value."""

Doubles = npt.NDArray[np.float64]
Range = tuple[float, float]
Fit = Callable[[Doubles, float, float], Range]
"""The range to be rounded, from a histogram and the ends of its first and last bin."""


class Observer(Protocol):
    """Looks at values inside a graph on the calibration batches, wherever that is done."""

    def extremes(self, model: ModelProto, values: Sequence[str]) -> ByName:
        """`Extremes` of each value, of one channel; a value that is empty in every batch has none."""

    def histograms(self, model: ModelProto, edges: Mapping[str, Range]) -> ByName:
        """`Histogram` of each value between its edges, of `BINS` bins."""


def extremes(model: ModelProto, values: Sequence[str], batches: Iterable[Inputs]) -> ByName:
    """Smallest and largest of each value; NaN or infinity show in them. A value without elements is left out."""
    found = ByName()
    for rows in observe(model, values, batches, finite=False):
        seen = {name: Extremes.of(array.reshape(-1)) for name, array in rows.items() if array.size}
        found = found.merge(ByName(values=seen))
    return found


def histograms(model: ModelProto, edges: Mapping[str, Range], batches: Iterable[Inputs]) -> ByName:
    """Counts of each value between its edges."""
    found = ByName()
    for rows in observe(model, list(edges), batches, finite=False):
        found = found.merge(ByName(values={name: Histogram.of(rows[name], BINS, *edges[name]) for name in edges}))
    return found


class Here:
    """An `Observer` in this process.

    Args:
        batches: calibration data.
    """

    def __init__(self, batches: Sequence[Inputs]) -> None:
        self._batches = batches

    def extremes(self, model: ModelProto, values: Sequence[str]) -> ByName:
        """See `Observer`."""
        return extremes(model, values, self._batches)

    def histograms(self, model: ModelProto, edges: Mapping[str, Range]) -> ByName:
        """See `Observer`."""
        return histograms(model, edges, self._batches)


def least_error_ranges(
    model: ModelProto, values: Sequence[str], observer: Observer, fit: Fit | None = None
) -> dict[str, Range]:
    """For each value the range whose 255 steps round it with the least squared error; what lies outside is clipped.

    The calibration data is run twice: for the extremes, and for histograms between them. A value that is not finite
    keeps its extremes.

    Args:
        model: float.
        values: names inside of it.
        observer: runs the calibration data.
        fit: the range by another measure.
    """
    fit = fit or _least_error
    seen = observer.extremes(model, values).values
    found = {name: (one.lows[0], one.highs[0]) for name, one in seen.items() if isinstance(one, Extremes)}
    edges = {name: (min(low, 0.0), max(high, 0.0)) for name, (low, high) in found.items()}
    edges = {name: (low, high) for name, (low, high) in edges.items() if low < high and np.isfinite(high - low)}
    counted = observer.histograms(model, edges).values if edges else {}
    for name, one in counted.items():
        if isinstance(one, Histogram):
            found[name] = fit(np.array(one.counts, np.float64), *edges[name])
    return found


def _least_error(counts: Doubles, low: float, high: float) -> Range:
    """Both ends by turns, twice: each is shrunk to where the error is least with the other as it stands."""
    middles = low + (np.arange(len(counts)) + 0.5) * (high - low) / len(counts)
    first, last = low, high
    for _ in range(2):
        if low < 0:
            errors = [_squared_error(counts, middles, low * share, last) for share in _SHARES]
            first = low * float(_SHARES[int(np.argmin(errors))])
        if high > 0:
            errors = [_squared_error(counts, middles, first, high * share) for share in _SHARES]
            last = high * float(_SHARES[int(np.argmin(errors))])
    return first, last


def _squared_error(counts: Doubles, middles: Doubles, low: float, high: float) -> float:
    step = (high - low) / LEVELS
    zero = np.clip(np.rint(-low / step), 0, LEVELS)
    rounded = (np.clip(np.rint(middles / step) + zero, 0, LEVELS) - zero) * step
    return float(counts @ np.square(rounded - middles))
