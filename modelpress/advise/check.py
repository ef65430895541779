"""Foretold against measured, after the advised recipe was run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from modelpress.errors import ConfigError
from modelpress.manifest import Manifest
from modelpress.reports import AdviceCheck, AdviceReport, CheckRow, LatencyReport, Predicted, QualityReport
from modelpress.reports.advice import Metric
from modelpress.strictjson import loads

METRICS: tuple[Metric, ...] = (
    "published_bytes",
    "latency_seconds",
    "batch_seconds",
    "throughput_per_second",
    "cold_start_seconds",
    "cost_per_million",
    "memory_bytes",
    "quality_drop",
)


class _Stage(BaseModel):
    """What counts here of a stage of a run."""

    model_config = ConfigDict(extra="ignore")

    stage: str
    quality: QualityReport | None = None
    latency: list[LatencyReport] = []


class _Run(BaseModel):
    """What counts here of what `modelpress run --json` prints."""

    model_config = ConfigDict(extra="ignore")

    name: str
    published_bytes: int
    stages: list[_Stage]


def read(path: Path) -> AdviceReport:
    """An advice that was written.

    Raises:
        ConfigError: the file holds none.
    """
    try:
        return AdviceReport.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ConfigError(
            f"reading advice {path}", found=str(error), expected="the NAME.json that `modelpress advise` wrote"
        ) from error


def measured(path: Path, batch_size: int) -> dict[Metric, float]:
    """The numbers of a run, as `modelpress run --json` prints it, or of a pack's manifest, which knows bytes alone.

    Raises:
        ConfigError: the file holds neither.
    """
    doing = f"reading what was measured from {path}"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(doing, found=str(error), fix="give the output of `modelpress run RECIPE --json`") from error
    document = loads(data, doing)
    if "format_version" in document:
        return {"published_bytes": float(Manifest.parse(data).published_bytes)}
    try:
        run = _Run.model_validate(document)
    except ValidationError as error:
        raise ConfigError(
            doing,
            found=str(error.errors(include_url=False)[0]["msg"]),
            expected="the output of `modelpress run RECIPE --json`, or a pack's manifest",
        ) from error
    return _of_run(run, batch_size)


def _of_run(run: _Run, batch_size: int) -> dict[Metric, float]:
    found: dict[Metric, float] = {"published_bytes": float(run.published_bytes)}
    timed = [stage for stage in run.stages if stage.latency]
    last = {row.batch_size: row for row in timed[-1].latency} if timed else {}
    if 1 in last:
        found["latency_seconds"] = last[1].p50_seconds
    if batch_size in last:
        found["batch_seconds"] = last[batch_size].p50_seconds
        found["throughput_per_second"] = last[batch_size].throughput_per_second
    judged = [stage.quality for stage in run.stages if stage.quality is not None]
    if judged and judged[-1].difference is not None:
        found["quality_drop"] = -judged[-1].difference
    return found


def compare(report: AdviceReport, found: dict[Metric, float]) -> AdviceCheck:
    """Each number that was foretold of the advised technique beside what was measured.

    Raises:
        ConfigError: nothing was advised.
    """
    advised = report.advised()
    if advised is None or advised.outlook is None:
        raise ConfigError(
            f"checking advice {report.name!r}", found="an advice without an advised recipe", fix="widen its budget"
        )
    price = report.hardware.get("price_per_hour", 0.0)
    if price and "throughput_per_second" in found:
        found = found | {"cost_per_million": price / 3600 * 1e6 / found["throughput_per_second"]}
    rows = [_row(metric, getattr(advised.outlook, metric), found.get(metric)) for metric in METRICS]
    return AdviceCheck(
        name=report.name, machine=report.machine, technique=advised.technique, label=advised.label, rows=rows
    )


def _row(metric: Metric, predicted: Any, value: float | None) -> CheckRow:
    ratio = inside = None
    if isinstance(predicted, Predicted) and value is not None:
        inside = predicted.low <= value <= predicted.high
        if metric != "quality_drop" and predicted.value > 0 and value > 0:
            ratio = value / predicted.value
    return CheckRow(metric=metric, predicted=predicted, measured=value, ratio=ratio, inside=inside)
