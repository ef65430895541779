"""Blocks of runs with and without being watched take turns, so that watching has a price of its own and no figure of a
whole run is one that was watched."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from modelpress.profile.ran import typical

LEAST_RUNS = 10
MOST_ADDED = 0.05
"""What watching may add to the time of all runs, as a share of it: where a watched run is far slower, as with operators
of a microsecond, few runs are watched. `LEAST_RUNS` are in any case."""
_BLOCK_SECONDS = 0.1
"""Time of a block: long against the time that idle threads of another session keep their cores busy."""
_WARM_UP_RUNS = 3

Run = Callable[[], object]


@dataclass
class Turns:
    """Times of whole runs in seconds, and which of all watched runs they are."""

    plain: list[float] = field(default_factory=list)
    watched: list[float] = field(default_factory=list)
    kept: list[bool] = field(default_factory=list)
    """Of each watched run, in order, whether its time is among `watched`."""

    @property
    def watched_share(self) -> float:
        """Of all runs, those that were watched; what is not kept of them counts, of the others it does not."""
        return len(self.kept) / (len(self.plain) + len(self.kept))


def take_turns(
    plain: Run,
    watched: Run,
    seconds: float,
    *,
    added_seconds: float,
    most: int,
    watching: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Turns:
    """Run both for about `seconds`, as many watched runs as `MOST_ADDED` allows; the first of each block is not kept.

    Args:
        plain: a run that nothing watches.
        watched: the same, watched.
        seconds: time for all runs together.
        added_seconds: what watching is taken to add to a run until it has been measured.
        most: watched runs at most; `LEAST_RUNS` if that is more.
        watching: open during each block of watched runs.
    """
    turns = Turns()
    for _ in range(_WARM_UP_RUNS):
        plain()
        with watching():
            watched()
        turns.kept.append(False)
    most = max(LEAST_RUNS, most)
    start = time.perf_counter()
    while len(turns.kept) < most and (len(turns.watched) < LEAST_RUNS or time.perf_counter() - start < seconds):
        times = _block(plain, seconds=min(_BLOCK_SECONDS, seconds / 4))
        turns.plain += times
        added = typical(turns.watched) - typical(turns.plain) if turns.watched else added_seconds
        allowed = len(times) if added <= 0 else min(len(times), int(MOST_ADDED * sum(times) / added))
        with watching():
            found = _block(watched, runs=max(1, min(allowed - 1, most - len(turns.kept))))
        turns.watched += found
        turns.kept += [False, *(True for _ in found)]
    return turns


def _block(run: Run, *, seconds: float = 0.0, runs: int = 1) -> list[float]:
    """Times of so many runs, and of more until the time is over, after a first one that is not timed."""
    run()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < runs or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        run()
        times.append(time.perf_counter() - before)
    return times
