"""The config of a canary: how a candidate takes over, and what stops it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from modelpress.config.base import Config


class CanaryStep(Config):
    """One step on the way of a candidate."""

    mode: Literal["shadow", "canary"] = "canary"
    """`shadow`: the champion answers, and a share of the requests is run on the candidate afterwards and compared.
    `canary`: the candidate answers a share of the requests."""
    share: float = Field(default=0.05, gt=0, le=1)
    """Share of the requests; at most 0.9 for `canary`: the champion is what the candidate is compared with."""
    min_requests: int = Field(default=500, ge=1)
    """Requests that the candidate must have run in this step before the next one begins."""
    hold_seconds: float = Field(default=300.0, ge=0)
    """Least time that this step lasts."""

    @model_validator(mode="after")
    def _check(self) -> CanaryStep:
        if self.mode == "canary" and self.share > 0.9:
            raise ValueError("share of a canary step must be at most 0.9: the champion is what it is compared with")
        return self


class CanaryConfig(Config):
    """How a candidate takes over step by step, and what counts as harm."""

    steps: list[CanaryStep] = Field(
        default=[
            CanaryStep(mode="shadow", share=0.2),
            CanaryStep(share=0.05),
            CanaryStep(share=0.25),
            CanaryStep(share=0.5),
        ],
        min_length=1,
        max_length=32,
    )
    """In order. After the last the candidate becomes champion."""
    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    """Chance that a candidate that keeps all bounds is ever stopped by the tests, however long it runs; shared between
    them."""
    beta: float = Field(default=0.05, gt=0, lt=0.5)
    """Chance that a candidate that breaks one of the bounds all the time is ever taken for one that keeps it."""
    max_error_ratio: float = Field(default=1.5, ge=1)
    """The candidate's rate of errors may be so many times the champion's."""
    error_floor: float = Field(default=0.01, gt=0, lt=1)
    """A rate of errors that does no harm, whatever the champion's is."""
    slow_seconds: float | None = Field(default=None, gt=0)
    """An answer that takes longer is slow; left out, each server takes the 95th percentile of its champion's."""
    max_slow_ratio: float = Field(default=2.0, ge=1)
    """The candidate's share of slow answers may be so many times the champion's."""
    slow_floor: float = Field(default=0.1, gt=0, lt=1)
    """A share of slow answers that does no harm, whatever the champion's is."""
    max_disagreement: float = Field(default=0.05, gt=0, lt=1)
    """Share of the mirrored samples on which the two may disagree."""
    compare: Literal["argmax", "values"] = "argmax"
    """What disagreement is: another largest number along the last axis, or numbers that differ by more than
    `tolerance`. Integers must be equal in both cases."""
    tolerance: float = Field(default=0.05, gt=0)
    """For `values`: the largest difference that agrees, as a part of the champion's largest number in the sample."""
    require_clear: bool = True
    """Before the end every test must show that its bound is kept. Off: it is enough that none shows the contrary."""
    max_step_seconds: float = Field(default=86_400.0, gt=0)
    """A step that has not enough requests, or evidence, after so long is inconclusive: the candidate goes."""
    servers: int = Field(default=64, ge=1, le=10_000)
    """Most servers that take part, restarted ones counted anew: each stops by itself what it alone has seen enough of,
    and they share half of `alpha`."""

    @model_validator(mode="after")
    def _check(self) -> CanaryConfig:
        longest = max(step.hold_seconds for step in self.steps)
        if longest >= self.max_step_seconds:
            raise ValueError(f"max_step_seconds must be more than the longest hold_seconds, {longest:g}")
        return self
