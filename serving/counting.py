"""What one server counts of a canary, and the moment at which its own counts are enough to stop."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np

from modelpress.canary import decide, tally
from modelpress.canary.decide import Test
from modelpress.canary.log import CanaryState
from modelpress.canary.tally import ArmTally, StepTally
from modelpress.config import CanaryConfig

CALIBRATION = 200
"""Answers of the champion by which a server learns what is slow."""
QUANTILE = 0.95
"""Of those; one answer in twenty of the champion is slow by this."""


@dataclass
class _Arm:
    requests: int = 0
    errors: int = 0
    timed: int = 0
    slow: int = 0

    def tally(self) -> ArmTally:
        return ArmTally(requests=self.requests, errors=self.errors, timed=self.timed, slow=self.slow)


@dataclass
class _Step:
    champion: _Arm = field(default_factory=_Arm)
    candidate: _Arm = field(default_factory=_Arm)
    mirrored: int = 0
    disagreement: float = 0.0
    dropped: int = 0


class Counter:
    """Counts of one canary on one server. Safe to call from threads."""

    def __init__(self, config: CanaryConfig) -> None:
        self._config, self._tests, self._alpha = config, decide.tests(config), decide.levels(config)[1]
        self._lock = threading.Lock()
        self._steps: dict[int, _Step] = {}
        self._learning: list[float] = []
        self.slow_seconds = config.slow_seconds
        """What is slow here; None until enough answers of the champion were timed."""
        self.version = 0
        """Grows with each count."""

    def answered(self, step: int, *, candidate: bool, seconds: float | None) -> str | None:
        """Count an answer, or a failure to answer (`seconds` None); the reason to stop, where there is one now."""
        with self._lock:
            self.version += 1
            arms = self._steps.setdefault(step, _Step())
            arm = arms.candidate if candidate else arms.champion
            arm.requests += 1
            slow = False
            if seconds is None:
                arm.errors += 1
            elif self.slow_seconds is not None:
                slow = seconds > self.slow_seconds
                arm.timed += 1
                arm.slow += slow
            elif not candidate:
                self._learn(seconds)
            # Evidence against the candidate grows with what it does wrong, and with nothing else.
            if not candidate or not (slow or seconds is None):
                return None
            return self._reason("errors" if seconds is None else "latency")

    def mirrored(self, step: int, disagreement: float) -> str | None:
        """Count a mirrored request; the reason to stop, where there is one now."""
        with self._lock:
            self.version += 1
            found = self._steps.setdefault(step, _Step())
            found.mirrored += 1
            found.disagreement += disagreement
            return self._reason("disagreement") if disagreement else None

    def dropped(self, step: int) -> None:
        """Count a request that was to be mirrored and was not."""
        with self._lock:
            self.version += 1
            self._steps.setdefault(step, _Step()).dropped += 1

    def tallies(self) -> list[StepTally]:
        """All counts as they stand."""
        with self._lock:
            return self._tallies()

    def _tallies(self) -> list[StepTally]:
        return [
            StepTally(
                step=index,
                champion=one.champion.tally(),
                candidate=one.candidate.tally(),
                mirrored=one.mirrored,
                disagreement=one.disagreement,
                dropped=one.dropped,
            )
            for index, one in sorted(self._steps.items())
        ]

    def _learn(self, seconds: float) -> None:
        self._learning.append(seconds)
        if len(self._learning) == CALIBRATION:
            self.slow_seconds = float(np.quantile(self._learning, QUANTILE))

    def _reason(self, test: Test) -> str | None:
        """Why this server stops, where the test says so; only this one can have changed."""
        if test not in self._tests:
            return None
        seen = tally.Tallies({one.step: one for one in self._tallies()}, servers=1)
        found = decide.alarm(test, self._config, seen, self._alpha)
        return found.line() if found is not None else None


def shown(state: CanaryState, stopped: str | None) -> dict[str, object]:
    """A canary as a server's metadata shows it."""
    step = state.now
    document: dict[str, object] = {
        "candidate": state.candidate,
        "step": state.step + 1,
        "steps": len(state.config.steps),
        "mode": step.mode,
        "share": step.share,
    }
    return document | ({"stopped": stopped} if stopped else {})
