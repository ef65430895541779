"""The clock by which waits and rights to act end."""

from __future__ import annotations

import time


def awake() -> float:
    """Seconds on a clock that goes on while the machine sleeps, where there is one."""
    which = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))
    return time.monotonic() if which is None else time.clock_gettime(which)
