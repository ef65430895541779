"""Canaries and tallies for tests, without packs."""

from __future__ import annotations

import uuid
from typing import Any

from modelpress.canary import tally
from modelpress.canary.log import CanaryState
from modelpress.canary.tally import ArmTally, StepTally, Tallies, Tally
from modelpress.config import CanaryConfig

CANDIDATE, CHAMPION = "c" * 64, "a" * 64
SHADOW = {"mode": "shadow", "share": 0.5, "min_requests": 10, "hold_seconds": 10}
CANARY = {"mode": "canary", "share": 0.5, "min_requests": 10, "hold_seconds": 10}


def config(*steps: dict[str, Any], **more: Any) -> CanaryConfig:
    return CanaryConfig.model_validate({"steps": list(steps) or [SHADOW, CANARY], **more})


def state(step: int = 0, made: CanaryConfig | None = None, **more: Any) -> CanaryState:
    document = {"id": "1" * 32, "alias": "champion", "candidate": CANDIDATE, "champion": CHAMPION, "after": 1}
    document |= {"gate": {}, "decision": {}, "began": "2026-01-01T00:00:00Z"}
    return CanaryState.model_validate({**document, "config": made or config(), "step": step, **more})


def shadowed(requests: int, disagreement: float = 0.0, step: int = 0) -> StepTally:
    return StepTally(step=step, mirrored=requests, disagreement=disagreement)


def split(candidate: int, errors: int = 0, slow: int = 0, step: int = 1, champion: int | None = None) -> StepTally:
    """Requests of a canary step whose champion answers all, as many by default, and slowly in 5 of 100."""
    others = candidate if champion is None else champion
    return StepTally(
        step=step,
        champion=ArmTally(requests=others, timed=others, slow=others // 20),
        candidate=ArmTally(requests=candidate, errors=errors, timed=candidate - errors, slow=slow),
    )


def by(*steps: StepTally, server: str = "", condition: Any = "taking part", reason: str = "") -> Tally:
    return tally.new("1" * 32, server or uuid.uuid4().hex, condition, list(steps), reason=reason)


def seen(*steps: StepTally, **more: Any) -> Tallies:
    return tally.add_up([by(*steps, **more)])
