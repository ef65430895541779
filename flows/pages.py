"""The page of a run: what it is drawn from, where it is kept, and what MLflow gets of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flows.result import StageRow
from modelpress.config import OptimizeConfig
from modelpress.reports import (
    CompressReport,
    EvaluationReport,
    PruneReport,
    Report,
    RunReport,
    RunStage,
    UploadReport,
)
from modelpress.settings import Settings
from modelpress.store.base import open_store

PAGE = "report.html"
"""Name of the page among the artifacts of a run in MLflow."""
COMPARED = "source (onnx)"


def run_report(
    config: OptimizeConfig,
    rows: Sequence[StageRow],
    reports: Mapping[str, Report],
    evaluations: Mapping[str, EvaluationReport],
    *,
    published: UploadReport | None,
    served: str,
    stopped: str | None,
    links: Mapping[str, str],
) -> RunReport:
    """What a run did, from what it noted of its stages; stages that have no row of their own come at the end."""
    noted = [
        RunStage(
            stage=row.stage,
            seconds=row.seconds,
            reused=row.reused,
            size_bytes=row.size_bytes,
            evaluation=evaluations.get(row.stage),
            report=_told(reports[row.stage]) if row.stage in reports else {},
        )
        for row in rows
    ]
    shown = {row.stage for row in rows}
    noted += [
        RunStage(stage=label, report=_told(report))
        for label, report in reports.items()
        if label not in shown and not label.startswith("evaluate ")
    ]
    return RunReport(
        name=config.name,
        pack=published.pack if published is not None else None,
        source_bytes=next((row.size_bytes for row in rows if row.stage == "source"), None),
        stages=noted,
        served=served if served in evaluations else None,
        compared=COMPARED if COMPARED in evaluations else None,
        stopped=stopped,
        config=config.model_dump(mode="json"),
        links=dict(links),
    )


def draw_and_keep(settings: Settings, run: RunReport, *, keep: bool) -> str:
    """The page of a run; kept beside the pack with the run, where it published and none is kept there, or `keep`."""
    from modelpress import run_records
    from modelpress.page import Story, read_story, render, report_page

    if run.pack is None:
        return render(report_page(Story(run.name, run=run)))
    store = open_store(settings.store_uri, settings)
    story = read_story(store, run.name, run.pack, run)
    page = render(report_page(story))
    # Who encrypts a pack has its reports encrypted as well: MLflow alone gets them in the clear.
    is_open = story.manifest is not None and story.manifest.encryption is None
    if is_open and (keep or run_records.newest(store, run.name, run.pack) is None):
        run_records.keep(store, run, page.encode())
    return page


def _told(report: Report) -> dict[str, Any]:
    """A report as JSON, without what the manifest has as well and what is longer than anybody reads."""
    without: Any = None
    if isinstance(report, CompressReport):
        without = {"tensors"}
    elif isinstance(report, PruneReport):
        without = {"tensors": {"__all__": {"kept"}}}
    found: dict[str, Any] = _finite(report.model_dump(mode="json", exclude=without))
    return found


def _finite(value: Any) -> Any:
    """JSON knows neither infinities nor NaNs: a loss that went there is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list) else value
