"""Report of an advice: what is foretold of each technique, why, what speaks against it, and what came of it.

A foretold number has an interval and says how it was found. Where nothing can be foretold there is a reason, and
never a number.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from modelpress.reports.base import Report

Metric = Literal[
    "published_bytes",
    "memory_bytes",
    "latency_seconds",
    "batch_seconds",
    "throughput_per_second",
    "cold_start_seconds",
    "cost_per_million",
    "quality_drop",
]


class Predicted(Report):
    """A number that was foretold."""

    value: float = Field(allow_inf_nan=False)
    """What is expected."""
    low: float = Field(allow_inf_nan=False)
    """Lower end of the interval."""
    high: float = Field(allow_inf_nan=False)
    """Upper end of the interval."""
    by: str = ""
    """How it was found."""

    @model_validator(mode="after")
    def _check(self) -> Predicted:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"{self.value} is foretold, outside of its own interval {self.low} to {self.high}")
        return self

    def scaled(self, factor: float, by: str = "") -> Predicted:
        """The same times a positive factor."""
        return Predicted(value=self.value * factor, low=self.low * factor, high=self.high * factor, by=by or self.by)


class NotPredicted(Report):
    """Why a number could not be foretold."""

    not_predicted: str = Field(min_length=1)
    """The reason, and what would change it."""


Prediction = Predicted | NotPredicted


class Outlook(Report):
    """What a model is foretold to be like on the hardware that was asked about."""

    published_bytes: Prediction
    """Of the pack: coded tensors, graph, files and manifest."""
    memory_bytes: Prediction
    """Of its tensors in memory, once loaded, and of the largest activations where those are known."""
    latency_seconds: Prediction
    """Of a call with one sample, median."""
    batch_seconds: Prediction
    """Of a call with `batch_size` samples, median."""
    throughput_per_second: Prediction
    """Samples per second in calls of `batch_size`."""
    cold_start_seconds: Prediction
    """From the first byte on the network to the first answer."""
    cost_per_million: Prediction
    """Of a million samples in calls of `batch_size`, in the currency of `price_per_hour`."""
    quality_drop: Prediction
    """In the metric's own units, against the source model; negative is a gain."""

    def value(self, metric: Metric) -> float | None:
        """What is foretold; None where nothing is."""
        found: Prediction = getattr(self, metric)
        return found.value if isinstance(found, Predicted) else None


class Advised(Report):
    """One way to go, and what is foretold of it."""

    technique: str
    """What it is, such as `static` or `data-parallel`."""
    label: str
    """In words, with its settings."""
    stages: dict[str, Any] = Field(default_factory=dict)
    """What it puts into a recipe; empty where it needs no stage, or is no part of one."""
    in_recipe: bool
    """Whether a recipe can say it: what it asks of whoever serves (more machines, larger batches) is no part of one."""
    outlook: Outlook | None
    """What is foretold; None where the technique cannot be had here."""
    gain: Prediction
    """How many times better it is than the model as it is now in what was asked for; above 1 is better."""
    fits: bool
    """Whether all that was asked is kept, by what is foretold."""
    obstacles: list[str] = Field(default_factory=list)
    """What is not kept, or why it cannot be had."""
    evidence: list[str] = Field(default_factory=list)
    """The numbers that speak for it."""
    counter_evidence: list[str] = Field(default_factory=list)
    """The numbers, and earlier measurements, that speak against it."""


class KernelSpeed(Report):
    """What one product takes, measured by itself."""

    shape: str
    """Operator, weight and input."""
    kernel: str
    """How it is computed."""
    seconds: Prediction
    """Of one product."""


class AdviceReport(Report):
    """An advice."""

    name: str
    """Of the recipe."""
    machine: str
    """That was measured on: processor, cores, runtime."""
    objective: Literal["bytes", "latency", "throughput", "cold-start", "cost"]
    """What was to be best."""
    binding: str
    """Why this objective: what was asked, or what the profile says binds."""
    batch_size: int
    """Samples of the larger call."""
    budget: dict[str, float]
    """What had to be kept."""
    hardware: dict[str, float]
    """What it will run on."""
    now: Outlook
    """The model as it is: in float, every tensor raw."""
    ranked: list[Advised]
    """All techniques: first those that fit, the best first; then those that do not, and those without a number."""
    chosen: str | None
    """Label of the advised one; None where nothing that can be put into a recipe fits."""
    config: dict[str, Any] | None
    """The recipe to run (`OptimizeConfig`); None where none is advised."""
    kernels: list[KernelSpeed]
    """The speeds that the times were foretold by."""
    checks: list[str]
    """How far off earlier advice was, by metric."""
    seconds: float
    """Time that the advice took."""

    def advised(self) -> Advised | None:
        """The advised one."""
        return next((one for one in self.ranked if one.label == self.chosen), None)


class CheckRow(Report):
    """One number, foretold and measured."""

    metric: Metric
    """Which."""
    predicted: Prediction
    """What was foretold."""
    measured: float | None
    """What was measured; None where the run did not."""
    ratio: float | None
    """measured ÷ foretold; None where there are not both, or one is not positive (a quality drop)."""
    inside: bool | None
    """Whether it lies in the foretold interval."""


class AdviceCheck(Report):
    """Foretold against measured, after the advised recipe was run."""

    name: str
    """Of the recipe."""
    machine: str
    """That the advice was made on."""
    technique: str
    """That was advised."""
    label: str
    """With its settings."""
    rows: list[CheckRow]
    """One per number that was foretold or measured."""
