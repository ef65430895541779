"""Blocks of runs with and without being watched take turns, so that watching has a price of its own and no figure of a
whole run is one that was watched."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from modelpress.profile.ran import typical

LEAST_RUNS = 10
MOST_ADDED = 0.04
"""What watching may add to the time of all runs, as a share of it: where a watched run is far slower, as with operators
of a microsecond, few runs are watched. `LEAST_RUNS` are in any case. What a watched run costs is known only while it is
measured: less than the 5 % that are promised, so that it may turn out dearer."""
SPIN_SECONDS = 0.15
"""For so long after a run, threads of an ONNX Runtime session keep their cores busy, looking for work: 0.14 s on the
machine where it was measured, in which the runs of another session took up to four times as long."""
_BLOCK_SECONDS = 0.1
_LEAST_BLOCK = 3
"""Watched runs for whose sake unwatched ones are interrupted."""
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
    settle_seconds: float = 0.0,
) -> Turns:
    """Run both for about `seconds`, as many watched runs as `MOST_ADDED` allows; the first of each block is not kept.

    Args:
        plain: a run that nothing watches.
        watched: the same, watched.
        seconds: time for all runs together.
        added_seconds: what watching is taken to add to a run until it has been measured.
        most: watched runs at most; `LEAST_RUNS` if that is more.
        watching: open during each block of watched runs.
        settle_seconds: to wait wherever the two take turns.
    """
    turns = Turns()
    for _ in range(_WARM_UP_RUNS):
        plain()
        with watching():
            watched()
        turns.kept.append(False)
    most = max(LEAST_RUNS, most)
    start = time.perf_counter()
    time.sleep(settle_seconds)
    while len(turns.kept) < most:
        turns.plain += _block(plain, seconds=min(_BLOCK_SECONDS, seconds / 4))
        is_over = time.perf_counter() - start >= seconds
        if is_over and len(turns.watched) >= LEAST_RUNS:
            break
        runs = min(_allowed(turns, added_seconds), most - len(turns.kept))
        if is_over:
            runs = max(runs, LEAST_RUNS + 1 - len(turns.watched))
        elif runs < _LEAST_BLOCK and turns.watched:
            continue
        time.sleep(settle_seconds)
        with watching():
            found = _block(watched, runs=max(1, runs - 1))
        turns.watched += found
        turns.kept += [False, *(True for _ in found)]
        time.sleep(settle_seconds)
    return turns


def _allowed(turns: Turns, added_seconds: float) -> int:
    """Watched runs that `MOST_ADDED` still allows; as many as there were others where watching costs nothing."""
    added = typical(turns.watched) - typical(turns.plain) if turns.watched else added_seconds
    free = len(turns.plain) - len(turns.kept)
    return free if added <= 0 else min(free, int(MOST_ADDED * sum(turns.plain) / added) - len(turns.kept))


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
