"""What a run of the line returns, and how its stages read as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from modelpress.reports import AttributionReport, EvaluationReport, LatencyReport, QualityReport, Report, trainings
from registry.gates import Decision


class StageRow(Report):
    """One stage of a run."""

    stage: str
    """The stage; `source (onnx)` is the source model as ONNX Runtime runs it, what speed is compared with."""
    runtime: str | None = None
    """`torch` or `onnxruntime`, where the stage's output was run."""
    quality: QualityReport | None = None
    """None where the stage is lossless."""
    size_bytes: int | None = None
    """Bytes of its output."""
    attribution: AttributionReport | None = None
    """How alike its reasons are to the source model's; None where that was not asked, or is lossless."""
    latency: list[LatencyReport] = Field(default_factory=list)
    """One per measured batch size."""
    seconds: float
    """Time that the stage took when it ran, its evaluation included."""
    reused: bool
    """Whether finished outputs were taken instead of running."""


class OptimizeResult(Report):
    """What a run of the line delivered."""

    name: str
    """Name of the pack."""
    pack: str
    """Digest of the manifest: the pack's identity."""
    uri: str
    """Where the manifest lies."""
    version: str
    """Number of the registered model version."""
    source_bytes: int
    """The source model's checkpoint."""
    published_bytes: int
    """All bytes of the pack."""
    compression_ratio: float
    """source ÷ published."""
    speedup: float | None
    """Throughput ÷ the source model's in ONNX Runtime, at the largest measured batch."""
    stages: list[StageRow]
    """In the order of the line."""
    recomputed: list[str]
    """Stages that ran now; empty when all was reused."""
    decision: Decision | None
    """What the gate said; None where nothing asked it."""
    graph: str
    """Digest of the served graph in the work store, before coding."""
    mlflow_run: str
    """Id of the MLflow run."""
    mlflow_url: str
    """Its page."""
    flow_run_url: str
    """Page of the Prefect flow run."""
    page_problems: list[str] = Field(default_factory=list)
    """What of the run's page could not be drawn or kept, and the way out; empty where all of it was."""


def throughput(report: EvaluationReport) -> float:
    """Samples per second at the largest measured batch."""
    return max(report.latency, key=lambda row: row.batch_size).throughput_per_second


def table(rows: Sequence[StageRow]) -> list[dict[str, Any]]:
    """The stages as rows of text, the same in the Prefect UI, in MLflow's report and in the terminal."""
    explained = any(row.attribution for row in rows)
    batches = sorted({latency.batch_size for row in rows for latency in row.latency})
    return [
        {
            "stage": row.stage,
            "quality": format_quality(row.quality),
            **({"same reasons": _reasons(row.attribution)} if explained else {}),
            "bytes": format_bytes(row.size_bytes),
            **{f"p50 ms b{batch}": _p50(row, batch) for batch in batches},
            **{f"/s b{batch}": _per_second(row, batch) for batch in batches[-1:]},
            "seconds": f"{row.seconds:.1f}" + (" (reused)" if row.reused else ""),
        }
        for row in rows
    ]


def markdown(rows: Sequence[StageRow]) -> str:
    """The same table in Markdown."""
    cells = table(rows)
    heads = list(cells[0])
    lines = [
        " | ".join(heads),
        " | ".join("---" for _ in heads),
        *(" | ".join(row[head] for head in heads) for row in cells),
    ]
    return "\n".join(f"| {line} |" for line in lines)


def memory_notes(reports: Mapping[str, Report]) -> list[str]:
    """A line in Markdown for each training that went on with smaller pieces because memory ran out."""
    return [
        f"- **{label}**: batches of its training ran in {training.batch_parts} parts, because memory ran out "
        f"({'; '.join(training.memory_errors)})"
        for label, report in reports.items()
        for training in trainings(report)
        if training.memory_errors
    ]


def format_quality(quality: QualityReport | None) -> str:
    """`0.9833 [0.972, 0.990]`, or a dash."""
    if quality is None:
        return "–"
    shown = "".join(f", {name} {value:.4g}" for name, value in quality.shown.items())
    return f"{quality.value:.4f} [{quality.low:.4f}, {quality.high:.4f}]{shown}"


def _reasons(found: AttributionReport | None) -> str:
    return f"{found.agreement:.3f} [{found.low:.3f}, {found.high:.3f}]" if found else "–"


def format_bytes(size: int | None) -> str:
    """Bytes with thousands set apart, or a dash."""
    return f"{size:,}" if size is not None else "–"


def _p50(row: StageRow, batch: int) -> str:
    return next((f"{found.p50_seconds * 1000:.2f}" for found in row.latency if found.batch_size == batch), "–")


def _per_second(row: StageRow, batch: int) -> str:
    return next((f"{found.throughput_per_second:,.0f}" for found in row.latency if found.batch_size == batch), "–")
