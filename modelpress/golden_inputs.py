"""Inputs for golden samples that are nobody's data: noise of the types, shapes and ranges that the real ones have.

What is taken from the calibration data is, for each input, its shape in one batch and a few numbers over all its
elements: least, largest, mean and deviation, to three digits. The noise comes from SHAKE-256 over the input's name, so
that the same data give the same bytes on each machine, with each numpy.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from modelpress.workload import Workload

OBSERVED: Final = 16
"""Calibration samples, at least, whose ranges are looked at."""
_UNIFORMS: Final = 12
"""Their sum less 6 has mean 0 and deviation 1, and is within 6 of them: nearly normal, by additions alone (Irwin & Hall
1927, doi:10.1093/biomet/19.3-4.225)."""


def of_workload(workload: Workload, samples: int) -> dict[str, np.ndarray]:
    """Inputs by name, `samples` rows of each, like the calibration data of a workload."""
    observed = workload.example(max(samples, OBSERVED))
    return synthetic({name: tensor.numpy() for name, tensor in observed.items()}, samples)


def synthetic(observed: Mapping[str, np.ndarray], samples: int) -> dict[str, np.ndarray]:
    """Noise that is like what was observed.

    Floats are normal, with the mean and the deviation of all observed elements, cut to their range. Integers and
    booleans are uniform between the least and the largest. An input with `mask` in its name hides nothing: it is the
    largest of its values everywhere.

    Args:
        observed: by name, samples first.
        samples: rows that are wanted.

    Returns:
        By name, in the observed types.
    """
    return {name: _like(name, array, (samples, *array.shape[1:])) for name, array in observed.items()}


def _like(name: str, observed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if not observed.size:
        return np.zeros(shape, observed.dtype)
    if "mask" in name.lower():
        return np.full(shape, observed.max(), observed.dtype)
    if observed.dtype.kind == "b":
        return _like(name, observed.astype(np.uint8), shape).astype(np.bool_)
    least, largest = observed.min().item(), observed.max().item()
    if observed.dtype.kind in "iu":
        # Remainders favour small numbers, by less than one part in 2^32 for any vocabulary.
        steps = _bits(name, shape, np.uint64) % np.uint64(min(largest - least + 1, 2**63))
        whole: np.ndarray = (steps.astype(object) + least).astype(observed.dtype)
        return whole
    known = observed.astype(np.float64)
    mean, deviation = _rounded(float(known.mean())), _rounded(float(known.std()))
    uniforms = _bits(name, (*shape, _UNIFORMS), np.uint32).astype(np.float64) / 2**32
    normal = uniforms.sum(axis=-1) - _UNIFORMS / 2
    drawn: np.ndarray = np.clip(mean + deviation * normal, _rounded(least), _rounded(largest))
    return drawn.astype(observed.dtype, copy=False)


def _bits(name: str, shape: tuple[int, ...], dtype: type[np.uint32 | np.uint64]) -> np.ndarray:
    count = math.prod(shape)
    data = hashlib.shake_256(f"modelpress golden input {name}".encode()).digest(count * np.dtype(dtype).itemsize)
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).astype(dtype).reshape(shape)


def _rounded(value: float) -> float:
    """To three digits: sums of floats differ in the last bits from machine to machine."""
    return float(f"{value:.3g}")
