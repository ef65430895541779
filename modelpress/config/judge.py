"""The configs of what is measured and of who may be served."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from modelpress.config.base import Alias, Config
from modelpress.providers import CPU, Provider

HardwareClass = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$")]
"""Name of a kind of machine, such as ``c7i-2xlarge``; it is part of tags in MLflow."""


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
    provider: Provider = CPU
    """ONNX Runtime execution provider; one that is asked for and missing, or that takes no part of the graph, is an
    error."""
    attribution_samples: int = Field(default=0, ge=0, le=10_000)
    """Evaluation samples on which the reasons for the answers are compared with the source model's; 0: none."""


class GateConfig(Config):
    """Who may become champion."""

    margin: float = Field(default=0.01, gt=0)
    """Non-inferiority margin in the metric's own units, against the source model and against the champion."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """One-sided confidence of the tests."""
    equivalence: bool = False
    """Against the source model, ask that the candidate is not better by more than the margin either: two one-sided
    tests. What differs from its source, for better or worse, is another model."""
    further_margins: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}
    """Non-inferiority margins of the workload's further metrics, by name; the named ones are judged as the first is."""
    slice_margin: float = Field(default=0.0, ge=0)
    """Non-inferiority margin within each slice of the evaluation samples; 0 does not ask."""
    slice_floors: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = {}
    """Least value of the metric within a slice, by the slice's name."""
    min_compression_ratio: float = Field(default=1.0, ge=0)
    """Least source bytes ÷ published bytes."""
    max_published_bytes: int = Field(default=0, ge=0)
    """Most bytes that the pack may have; 0 does not ask."""
    min_speedup: float = Field(default=0.0, ge=0)
    """Least throughput ratio to the source model in ONNX Runtime, at the largest measured batch; 0 does not ask."""
    hardware: HardwareClass | None = None
    """Class of the machines that serve (what MODELPRESS_HARDWARE says there): `provider`, `max_p99_seconds` and
    `min_throughput_per_second` hold for figures that were measured on that class, and no others count."""
    provider: Provider | None = None
    """ONNX Runtime execution provider that must have been in use when the figures were measured."""
    max_p99_seconds: float = Field(default=0.0, ge=0)
    """Longest 99th percentile of a call at the smallest measured batch; 0 does not ask."""
    min_throughput_per_second: float = Field(default=0.0, ge=0)
    """Least samples per second at the largest measured batch; 0 does not ask."""
    min_quantization_coverage: float = Field(default=0.0, ge=0, le=1)
    """Least share of the eligible weights that must be quantized, where the recipe quantizes; 0: some."""
    min_pruning_coverage: float = Field(default=0.0, ge=0, le=1)
    """Least share of the eligible weights in tensors that must be pruned, where the recipe prunes; 0: some."""
    min_attribution_agreement: float = Field(default=0.0, ge=0, le=1)
    """Least rank correlation of the attributions with the source model's; 0 does not ask. Needs
    evaluate.attribution_samples."""
    require_signature: bool = False
    """The published pack must carry the signatures that the trust file (MODELPRESS_TRUST) asks for; nobody overrides
    this."""
    require_lineage: bool = False
    """The pack must say what it was made from: the source model's digest, its recipe and the libraries' versions."""
    licences: list[str] = []
    """Licences of the source model that may be served, as the manifest has them, with * for any characters; `*` takes
    any that is known. Empty does not ask."""
    alias: Alias = "champion"
    """The pointer that a passed gate moves."""
    approval: bool = False
    """A person must agree as well, once everything else passed: the run pauses, and is answered in Prefect's UI."""
    approval_hours: float = Field(default=24.0, gt=0, le=720)
    """How long it waits; no answer is a no."""

    @model_validator(mode="after")
    def _check(self) -> GateConfig:
        bounds = ("provider", "max_p99_seconds", "min_throughput_per_second")
        asked = [f"gate.{name}" for name in bounds if getattr(self, name)]
        if asked and self.hardware is None:
            raise ValueError(f"{', '.join(asked)} needs gate.hardware: figures say something of one class of machines")
        if self.hardware is not None and not asked:
            raise ValueError(f"gate.hardware is only read with one of {', '.join(f'gate.{name}' for name in bounds)}")
        return self
