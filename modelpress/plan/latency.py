"""How long a call takes, side by side: what a plan for time is made on and judged by."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from modelpress import graph
from modelpress.agreement import Inputs
from modelpress.checkpoint import Checkpoint

Clock = Callable[[Sequence[Checkpoint]], list[float]]
"""Seconds of a call to each of some checkpoints, in one measurement."""

WARM_UP_CALLS = 2
LEAST_CALLS = 12
TURNS = 3


def in_turns(checkpoints: Sequence[Checkpoint], inputs: Inputs, seconds: float) -> list[float]:
    """The fastest call to each, in seconds; it takes what `times_in_turns` does."""
    return [min(times) for times in times_in_turns(checkpoints, inputs, seconds)]


def times_in_turns(checkpoints: Sequence[Checkpoint], inputs: Inputs, seconds: float) -> list[list[float]]:
    """Times of calls to each, in seconds; they take turns, so that whatever else the machine does strikes all alike.

    A turn is a block of calls to a session of its own, which ends with it: threads of ONNX Runtime look for work for up
    to 0.14 s after a call before they sleep, and calls to another session meanwhile take up to four times as long, as
    measured on two cores.

    Args:
        checkpoints: ONNX ones.
        inputs: of a call.
        seconds: to spend on calls in all, beside making sessions and two calls to warm up each time; at least twelve
            calls to each are made.
    """
    found: list[list[float]] = [[] for _ in checkpoints]
    for _ in range(TURNS):
        for times, checkpoint in zip(found, checkpoints, strict=True):
            session = graph.session(checkpoint)
            for _ in range(WARM_UP_CALLS):
                graph.run(session, inputs)
            times += _block(session, inputs, seconds / (TURNS * len(checkpoints)))
            del session  # and its threads, before the next one's calls
    return found


def _block(session: graph.Session, inputs: Inputs, seconds: float) -> list[float]:
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < LEAST_CALLS // TURNS or time.perf_counter() - started < seconds:
        before = time.perf_counter()
        graph.run(session, inputs)
        times.append(time.perf_counter() - before)
    return times
