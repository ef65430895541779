"""The config of variants of a recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from modelpress.config.base import Config


class VariantsConfig(Config):
    """Variants of one recipe: which there are, how they are tried, and which of them is wanted."""

    grid: dict[str, list[Any]] = {}
    """Values by setting, such as `prune.sparsity: [0.5, 0.7]`; each combination is a variant. A setting is a stage that
    makes bytes (distill, prune, export, quantize, plan, compress), or a field below it. Null leaves a stage out."""
    also: list[dict[str, Any]] = []
    """Further variants, each by what it sets; `{}` is the recipe as it is."""
    objective: Literal["bytes", "quality", "latency"] = "bytes"
    """What the best variant has the best of, among those within the budgets."""
    max_quality_drop: float | None = Field(default=None, ge=0)
    """Budget: what a variant may lose against the source model, by the whole interval. Null takes `gate.margin`."""
    max_bytes: int = Field(default=0, ge=0)
    """Budget: bytes of graph and coded tensors; 0 does not ask."""
    max_latency_seconds: float = Field(default=0.0, ge=0)
    """Budget: median time of a call at the smallest measured batch, alone on this machine; 0 does not ask."""
    workers: int = Field(default=2, ge=1, le=64)
    """Processes that try variants; each runs one at a time, and has cores of its own."""
    threads: int = Field(default=0, ge=0)
    """Cores of each; 0: the cores that the run may use, divided by `workers`."""
    seconds: float = Field(default=0.0, ge=0)
    """Kill a worker that takes longer for a variant, or for what several share; 0: never."""
    attempts: int = Field(default=3, ge=1, le=20)
    """How often a variant is tried whose worker dies or takes too long."""
    publish: bool = False
    """Publish the best variant in the end, and judge it as the recipe says. Without, nothing is published."""

    @model_validator(mode="after")
    def _check(self) -> VariantsConfig:
        if not self.grid and not self.also:
            raise ValueError("variants need a grid, or a list under `also`")
        empty = [name for name, values in self.grid.items() if not values]
        if empty:
            raise ValueError(f"grid.{empty[0]} names no value")
        return self
