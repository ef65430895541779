"""The config of a plan."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from modelpress.config.base import Config

Scale = Literal["tensor", "channel"] | Annotated[int, Field(ge=8, le=4096)]
"""What shares a scale: the whole tensor, an output channel, or so many neighbouring inputs of one."""


class PlanConfig(Config):
    """Give each weight of a float graph its own bits and scales, so that all take the fewest coded bytes within one
    budget. The graph goes on computing in float."""

    max_disagreement: float = Field(default=0.01, gt=0)
    """Budget on calibration data, against the float graph: mean Kullback-Leibler divergence of the softmax of logits,
    in nats, or 1 − mean cosine of embeddings."""
    num_bits: list[Annotated[int, Field(ge=2, le=8)]] = Field(default=[8, 7, 6, 5, 4, 3], min_length=1)
    """Bits of codes that a weight may take."""
    scales: list[Scale] = Field(default=["tensor", "channel", 64], min_length=1)
    """What may share a scale: `tensor`, `channel` (a row of a table), or a number of neighbouring inputs; the last is
    offered where it divides them."""
    embeddings: bool = True
    """Plan embedding tables (Gather) as well."""
    targets: list[str] = []
    """ONNX node names or globs; empty takes every MatMul, Gemm, Conv and, with `embeddings`, Gather. A weight that
    several nodes share is planned if one of them is named."""
    ignore: list[str] = []
    """ONNX node names or globs whose weights stay in float."""
    sensitivity_samples: int = Field(default=32, ge=8)
    """Calibration samples on which single weights are measured; whole plans are measured on all."""
    points: int = Field(default=8, ge=0, le=64)
    """Points of the front of bytes against disagreement that are built, measured and coded; 0: none."""

    @model_validator(mode="after")
    def _check(self) -> PlanConfig:
        for name in ("num_bits", "scales"):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ValueError(f"plan.{name} must not repeat")
        return self
