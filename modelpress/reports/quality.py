"""Reports of what is measured: quality, latency, attributions."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from modelpress.reports.base import Report, Stage


class QualityReport(Report):
    """A metric on held-out data, paired with the source model's on the same samples."""

    metric: str
    """Name, such as `accuracy` or `mrr`; higher is better."""
    samples: int
    """Number of evaluation samples."""
    value: float
    """Mean over the samples."""
    low: float
    """Lower end of its confidence interval."""
    high: float
    """Upper end of its confidence interval."""
    baseline: float | None = None
    """The source model's value."""
    difference: float | None = None
    """value − baseline; negative is a loss."""
    difference_low: float | None = None
    """Lower end of the paired difference's interval."""
    difference_high: float | None = None
    """Upper end of the paired difference's interval."""
    confidence: float = 0.95
    """Two-sided confidence of both intervals."""
    shown: dict[str, float] = Field(default_factory=dict)
    """The value in units that people know, such as `perplexity`."""

    def metrics(self) -> dict[str, float]:
        """Adds what is shown to the base's."""
        return {**super().metrics(), **self.shown}


class LatencyReport(Report):
    """Measured time of one batch size."""

    batch_size: int
    """Samples per call."""
    calls: int
    """Calls measured, after the warm-up."""
    p50_seconds: float
    """Median time of a call."""
    p99_seconds: float
    """99th percentile of the time of a call."""
    throughput_per_second: float
    """Samples per second."""


class AttributionExample(Report):
    """One sample, and what the two models looked at; nothing of the sample itself."""

    sample: int
    """Number of the sample in the evaluation split."""
    agreement: float
    """Rank correlation of the two."""
    places: list[int]
    """Where each part lies: a field of the grid counted row by row, a position in a text, a run of inputs."""
    before: list[float]
    """Attribution of each part, of the source model."""
    after: list[float]
    """The same, of this one."""
    rows: int | None = None
    """Rows of the grid of an image; None: it has none."""
    columns: int | None = None
    """Columns of it."""


class AttributionReport(Report):
    """How alike the reasons for a model's answers are to the original's."""

    method: Literal["integrated-gradients", "occlusion"]
    """How attributions were found: torch modules have gradients, graphs have not."""
    samples: int
    """Samples compared."""
    agreement: float
    """Mean rank correlation, −1 to 1."""
    low: float
    """Lower end of its interval."""
    high: float
    """Upper end of its interval."""
    confidence: float = 0.95
    """Two-sided confidence of the interval."""
    examples: list[AttributionExample] = Field(default_factory=list)
    """The samples on which the two agree least, as usual, and most."""


class EvaluationReport(Report):
    """What a model is worth after a stage."""

    stage: Stage
    """The stage whose output was measured."""
    runtime: str
    """`torch` or `onnxruntime`."""
    provider: str | None = None
    """ONNX Runtime execution provider in use."""
    hardware: str | None = None
    """Class of the machine that measured, as MODELPRESS_HARDWARE there has it; None where it has none."""
    quality: QualityReport
    """On the evaluation split."""
    further: list[QualityReport] = Field(default_factory=list)
    """Further metrics of the same samples."""
    size_bytes: int
    """Bytes of the artifact on disk."""
    latency: list[LatencyReport]
    """One per batch size."""
    peak_memory_bytes: int | None = None
    """Peak resident memory of the evaluation above what stood before it."""
    attribution: AttributionReport | None = None
    """Against the source model; absent where none was asked for."""

    def metrics(self) -> dict[str, float]:
        """Adds ``further.<metric>.*`` and ``latency.b<batch>.*`` to the base's."""
        flat = super().metrics()
        for one in self.further:
            flat |= {f"further.{one.metric}.{key}": value for key, value in one.metrics().items()}
        for row in self.latency:
            flat |= {f"latency.b{row.batch_size}.{key}": value for key, value in row.metrics().items()}
        return flat
