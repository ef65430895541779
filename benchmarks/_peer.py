"""One system in a race of coders: what codes and decodes one array, and its least CPU seconds over the rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


class PeerError(RuntimeError):
    """A peer could not be measured; says why."""


@dataclass
class Entrant:
    """A system that has coded the array, and shown that it decodes to the same bytes.

    `works` are what is timed, by name; each returns the CPU seconds of one run. `best` fills during the race.
    """

    name: str
    raw_bytes: int
    stored_bytes: int
    works: dict[str, Callable[[], float]]
    max_rounds: int | None = None
    """Slow ones run in fewer rounds."""
    best: dict[str, float] = field(default_factory=dict)
    failure: str | None = None

    def rate(self, work: str) -> float | None:
        """Raw bytes per second at the best; None where the work is not among its own, or failed."""
        seconds = self.best.get(work)
        return None if seconds is None or self.failure else self.raw_bytes / max(seconds, 1e-9)


def race(entrants: Sequence[Entrant], rounds: int) -> None:
    """In every round each entrant does each of its works once, so that a slow moment of the machine meets all alike."""
    for number in range(rounds):
        for entrant in entrants:
            if entrant.failure or number >= (entrant.max_rounds or rounds):
                continue
            try:
                for name, work in entrant.works.items():
                    entrant.best[name] = min(entrant.best.get(name, math.inf), work())
            except PeerError as error:
                entrant.failure = str(error)


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process for one run; what it returns is freed afterwards."""
    started = time.process_time()
    result = work()
    seconds = time.process_time() - started
    del result
    return seconds
