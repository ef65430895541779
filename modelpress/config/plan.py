"""The config of a plan."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from modelpress.config.base import Config, refuse_unread
from modelpress.config.train import TrainConfig

Scale = Literal["tensor", "channel"] | int
"""What shares a scale: the whole tensor, an output channel, or so many neighbouring inputs of one."""

ONLY_FOR: dict[str, tuple[str, ...]] = {
    "bytes": ("num_bits", "scales", "sparsity", "embeddings", "recovery"),
    "seconds": ("kernels", "batch_size", "latency_seconds"),
}
"""Options that the other objective does not read."""


class PlanConfig(Config):
    """Give each weight of a float graph a form of its own within one budget."""

    objective: Literal["bytes", "seconds"] = "bytes"
    """What is made least: coded bytes, by integer codes of each weight (the graph goes on computing in float); or the
    seconds of a call, by kernels that compute in integers, each measured on this machine."""
    max_disagreement: float = Field(default=0.01, gt=0)
    """Budget on calibration data, against the float graph: mean Kullback-Leibler divergence of the softmax of logits,
    in nats, or 1 − mean cosine of embeddings."""
    num_bits: list[Annotated[int, Field(ge=2, le=8)]] = Field(default=[8, 7, 6, 5, 4, 3], min_length=1)
    """For `bytes`: bits of codes that a weight may take."""
    scales: list[Literal["tensor", "channel"]] = ["tensor", "channel"]
    """For `bytes`: what may share a scale: all weights of a tensor, or those of an output channel (or table row)."""
    group_sizes: list[Annotated[int, Field(ge=8, le=4096)]] = [64]
    """Numbers of neighbouring inputs that may share a scale: for `bytes` each is offered where it divides the inputs;
    for `seconds`, those of MatMulNBits, powers of two from 16 on."""
    sparsity: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.0, 0.5], min_length=1)
    """For `bytes`: fractions of an output channel's weights that may become zero before rounding: those of least
    magnitude · root mean square of their input, or of least magnitude in tables; 0 is rounding alone."""
    embeddings: bool = True
    """For `bytes`: plan embedding tables (Gather) as well."""
    kernels: list[Literal["int8", "nbits-8", "nbits-4"]] = Field(default=["int8", "nbits-8", "nbits-4"], min_length=1)
    """For `seconds`: what may compute a MatMul or Gemm: `int8` ranges activations per call; `nbits-8` and `nbits-4`
    (ONNX Runtime's MatMulNBits) take them as they are."""
    batch_size: int = Field(default=1, ge=1)
    """For `seconds`: samples in the call that is timed."""
    latency_seconds: float = Field(default=0.5, gt=0, le=600)
    """For `seconds`: time spent on each kernel of each class of products."""
    targets: list[str] = []
    """ONNX node names or globs; empty takes every MatMul, Gemm, Conv and, with `embeddings`, Gather. A weight that
    several nodes share is planned if one of them is named."""
    ignore: list[str] = []
    """ONNX node names or globs whose weights stay in float."""
    sensitivity_samples: int = Field(default=32, ge=8)
    """Calibration samples on which single weights are measured; whole plans are measured on all."""
    recovery: TrainConfig | None = None
    """For `bytes`: train the model within the plan, its weights rounded as they will be stored, with the model as it
    was before as teacher; absent means none. The budget holds before and after."""
    points: int = Field(default=8, ge=0, le=64)
    """Points of the front of bytes (or seconds) against disagreement that are built, measured and coded; 0: none."""

    @property
    def needs_module(self) -> bool:
        """Whether the plan trains the torch module behind the graph."""
        return self.recovery is not None

    @property
    def sharing(self) -> list[Scale]:
        """`scales` and `group_sizes`."""
        return [*self.scales, *self.group_sizes]

    @model_validator(mode="after")
    def _check(self) -> PlanConfig:
        for name in ("num_bits", "scales", "group_sizes", "sparsity", "kernels"):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ValueError(f"plan.{name} must not repeat")
        other = "seconds" if self.objective == "bytes" else "bytes"
        refuse_unread(self, "plan", dict.fromkeys(ONLY_FOR[other], f"plan.objective {other!r}"))
        if self.objective == "bytes":
            self._check_codes()
        else:
            self._check_kernels()
        return self

    def _check_codes(self) -> None:
        if not self.sharing:
            raise ValueError("plan.scales and plan.group_sizes must not both be empty")
        if 0.0 not in self.sparsity:
            raise ValueError("plan.sparsity must hold 0: what zeros are worth is told by the same codes without them")

    def _check_kernels(self) -> None:
        grouped = any(name != "int8" for name in self.kernels)
        if grouped and not self.group_sizes:
            raise ValueError("plan.group_sizes must not be empty with 'nbits-8' or 'nbits-4' among plan.kernels")
        if grouped and any(size < 16 or size & (size - 1) for size in self.group_sizes):
            raise ValueError("plan.group_sizes must be powers of two from 16 on with plan.objective 'seconds'")
