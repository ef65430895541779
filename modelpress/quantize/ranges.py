"""Ranges of activations of least squared rounding error, from histograms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from modelpress.quantize.observe import Inputs, observe

LEVELS = 255
"""Steps of an 8-bit range."""

_BINS = 2048
_SHARES = np.linspace(0.02, 1.0, 50)
"""Candidates for each end of the range, as shares of the extreme value."""

Doubles = npt.NDArray[np.float64]
Range = tuple[float, float]


def extremes(model: ModelProto, values: Sequence[str], batches: Sequence[Inputs]) -> dict[str, Range]:
    """Smallest and largest of each value; NaN or infinity show in them."""
    found: dict[str, Range] = {}
    for rows in observe(model, values, batches, finite=False):
        for name, array in rows.items():
            if array.size:
                low, high = found.get(name, (np.inf, -np.inf))
                found[name] = (float(np.minimum(low, array.min())), float(np.maximum(high, array.max())))
    return found


def least_error_ranges(model: ModelProto, values: Sequence[str], batches: Sequence[Inputs]) -> dict[str, Range]:
    """For each value the range whose 255 steps round it with the least squared error; what lies outside is clipped.

    The calibration data is run twice: for the extremes, and for histograms between them. A value that is not finite
    keeps its extremes.
    """
    found = extremes(model, values, batches)
    edges = {name: (min(low, 0.0), max(high, 0.0)) for name, (low, high) in found.items()}
    edges = {name: (low, high) for name, (low, high) in edges.items() if low < high and np.isfinite(high - low)}
    counts = {name: np.zeros(_BINS) for name in edges}
    for rows in observe(model, list(edges), batches, finite=False) if edges else ():
        for name, array in rows.items():
            counts[name] += np.histogram(array, _BINS, edges[name])[0]
    return found | {name: _least_error(counts[name], *edges[name]) for name in edges}


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
