"""What a profiled run gives, whichever runtime ran it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Operator:
    """One operator as it was counted and timed; None is what could not be, and `untimed` says why."""

    name: str
    op_type: str
    dtype: str
    weights: list[str]
    weight_bytes: int
    flops: int | None
    read_bytes: int | None
    written_bytes: int | None
    seconds: float | None
    untimed: str = ""


@dataclass(frozen=True)
class Ran:
    """Runs of a model with and without being watched, in turns."""

    operators: list[Operator]
    """In the order in which they ran."""
    run_seconds: float
    """Typical time of those that were not watched."""
    watched_seconds: float
    """Typical time of those that were."""
    activations_bytes: int | None
    """Most bytes of values alive at once; None where a value's shape is not known."""
    watched_share: float = 0.5
    """Of all runs, those that were watched."""


def typical(seconds: Sequence[float]) -> float:
    """Mean of the middle half, between the quartiles: what a busy machine disturbs weighs as little as with a median,
    and it is finer where a clock counts whole microseconds."""
    ordered = np.sort(np.asarray(seconds, dtype=np.float64))
    cut = ordered.size // 4
    return float(ordered[cut : ordered.size - cut].mean())
