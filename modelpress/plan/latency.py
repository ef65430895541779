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
LEAST_CALLS = 10


def in_turns(checkpoints: Sequence[Checkpoint], inputs: Inputs, seconds: float) -> list[float]:
    """The fastest call to each, in seconds; they are called in turns, so that whatever else the machine does strikes
    all of them alike.

    Args:
        checkpoints: ONNX ones.
        inputs: of a call.
        seconds: to spend in all, after two calls to warm up each; at least ten calls to each are made.
    """
    sessions = [graph.session(one) for one in checkpoints]
    for session in sessions * WARM_UP_CALLS:
        graph.run(session, inputs)
    fastest, calls, started = [float("inf")] * len(sessions), 0, time.perf_counter()
    while calls < LEAST_CALLS or time.perf_counter() - started < seconds:
        for place, session in enumerate(sessions):
            before = time.perf_counter()
            graph.run(session, inputs)
            fastest[place] = min(fastest[place], time.perf_counter() - before)
        calls += 1
    return fastest
