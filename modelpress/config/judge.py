"""The configs of what is measured and of who may be served."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from modelpress.config.base import Alias, Config


class EvaluateConfig(Config):
    """What is measured after each stage that changed the model, and when the flow stops."""

    max_quality_drop: float = Field(default=0.02, ge=0)
    """Quality budget in the metric's own units: the flow stops at a stage whose drop against the source model is
    larger, by the whole confidence interval."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Confidence of the reported intervals."""
    batch_sizes: list[Annotated[int, Field(ge=1)]] = Field(default=[1, 32], min_length=1)
    """Batch sizes at which latency and throughput are measured."""
    latency_seconds: float = Field(default=2.0, gt=0, le=600)
    """Time spent measuring each batch size."""
    threads: int = Field(default=0, ge=0)
    """Intra-operator threads; 0 takes the cores that this process may use."""
    provider: Literal["CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"] = (
        "CPUExecutionProvider"
    )
    """ONNX Runtime execution provider; one that is asked for and missing is an error."""
    attribution_samples: int = Field(default=0, ge=0, le=10_000)
    """Evaluation samples on which the reasons for the answers are compared with the source model's; 0: none."""


class GateConfig(Config):
    """Who may become champion."""

    margin: float = Field(default=0.01, gt=0)
    """Non-inferiority margin in the metric's own units, against the source model and against the champion."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """One-sided confidence of the test."""
    min_compression_ratio: float = Field(default=1.0, ge=0)
    """Least source bytes ÷ published bytes."""
    min_speedup: float = Field(default=0.0, ge=0)
    """Least throughput ratio to the source model in ONNX Runtime, at the largest measured batch; 0 does not ask."""
    min_attribution_agreement: float = Field(default=0.0, ge=0, le=1)
    """Least rank correlation of the attributions with the source model's; 0 does not ask. Needs
    evaluate.attribution_samples."""
    alias: Alias = "champion"
    """The pointer that a passed gate moves."""
    approval: bool = False
    """A person must agree as well, once everything else passed: the run pauses, and is answered in Prefect's UI."""
    approval_hours: float = Field(default=24.0, gt=0, le=720)
    """How long it waits; no answer is a no."""
