"""The page of a run: what it is drawn from, where it is kept, and what MLflow gets of it.

A run that published has published, and one that was stopped has a reason of its own: what goes wrong with the page
alone is told, and ends neither otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefect.artifacts import create_table_artifact

from flows import figures
from flows.result import StageRow
from modelpress.config import OptimizeConfig
from modelpress.errors import ModelpressError, PageError
from modelpress.manifest import Encryption
from modelpress.reports import (
    CompressReport,
    EvaluationReport,
    PlanReport,
    ProfileReport,
    PruneReport,
    Report,
    RunReport,
    RunStage,
    UploadReport,
)
from modelpress.settings import Settings
from modelpress.store.base import Store, open_store

PAGE = "report.html"
"""Name of the page among the artifacts of a run in MLflow."""
STAGES = "stages.png"
"""Name of the plots of all stages there."""
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


def draw_plots(
    folder: Path, name: str, rows: Sequence[StageRow], reports: Mapping[str, Report], *, layers: bool = True
) -> list[PageError]:
    """The plots of a run as files: of its stages and, with `layers`, of its plan and its profile, which name them.

    Returns:
        What could not be drawn.
    """
    problems: list[PageError] = []
    planned, compressed, profiled = (reports.get(stage) for stage in ("plan", "compress", "profile"))
    with noted(problems, f"drawing the plots of {name}"):
        figures.draw(rows, compressed if isinstance(compressed, CompressReport) else None, folder / STAGES)
        if layers and isinstance(planned, PlanReport):
            from modelpress.plan import figure

            figure.draw(planned, folder / "plan.png")
        if layers and isinstance(profiled, ProfileReport):
            from modelpress.profile import figures as profiling

            profiling.draw(profiled, folder)
    return problems


def show_tables(key: str, name: str, reports: Mapping[str, Report]) -> None:
    """In Prefect: the front of a plan, and the operators of the source model with what binds it."""
    if isinstance(planned := reports.get("plan"), PlanReport):
        from modelpress.plan import show as planning

        description = f"The plan of `{name}`, its front, and all weights alike"
        create_table_artifact(planning.points(planned), key=f"{key}-plan", description=description)
    if isinstance(profiled := reports.get("profile"), ProfileReport):
        from modelpress.profile import show as profiling

        description = f"Operators of `{name}`; it is bound by {profiled.verdict.reason}"
        rows = profiling.operators(profiled, most=50)
        create_table_artifact(rows, key=f"{key}-profile", description=description)


@dataclass(frozen=True)
class Drawn:
    """What became of the page of a run."""

    page: str | None
    """HTML; None where it could not be drawn."""
    problems: Sequence[PageError]
    """What could not be read, drawn or kept, and the way out."""


def draw_and_keep(settings: Settings, run: RunReport, *, keep: bool) -> Drawn:
    """The page of a run; kept beside the pack with the run, where it published and none is kept there, or `keep`.

    What fails is among the problems: a pack that can't be read leaves a page of the run alone, and keeps nothing; a
    page that can't be drawn leaves the run's numbers beside the pack, without one.
    """
    from modelpress.page import Story, read_story, render, report_page

    problems: list[PageError] = []
    page: str | None = None
    store: Store | None = None
    story = Story(run.name, run=run)
    if run.pack is not None:
        with noted(problems, f"reading what lies beside pack {run.name}@{run.pack}, for the page", _again(run)):
            store = open_store(settings.store_uri, settings)
            story = read_story(store, run.name, run.pack, run)
        if problems:
            story = replace(story, unread=problems[0].found)
    with noted(problems, f"drawing the page of {run.name}", _later(run)):
        page = render(report_page(story))
    if store is not None and story.manifest is not None:
        with noted(problems, f"keeping the run, and its page, beside pack {run.name}@{run.pack}", _again(run)):
            _keep(store, run, page, story.manifest.encryption, always=keep)
    return Drawn(page, problems)


def _keep(store: Store, run: RunReport, page: str | None, encryption: Encryption | None, *, always: bool) -> None:
    from modelpress import run_records

    assert run.pack is not None
    if always or not run_records.counts(store, run.name, run.pack):
        run_records.keep(store, run, page.encode() if page is not None else None, encryption)


@contextmanager
def noted(problems: list[PageError], doing: str, fix: str | None = None) -> Iterator[None]:
    """An error of ours in this block, or one of `drawing.UNDRAWABLE`, is one more problem, and ends nothing else."""
    from modelpress.page import drawing

    try:
        with drawing(doing):
            yield
    except ModelpressError as error:
        problem = PageError(doing, found=_found(error), fix=fix or error.fix)
        problem.__cause__ = error.__cause__ if isinstance(error, PageError) else error
        problems.append(problem)


def _found(error: ModelpressError) -> str:
    """What an error of ours found, and its own way out."""
    if isinstance(error, PageError):
        return error.found or error.doing
    told = [f"{type(error).__name__}, {error.doing}"]
    told += [f"{label} {text}" for label, text in (("found", error.found), ("fix:", error.fix)) if text]
    return "; ".join(told)


def _again(run: RunReport) -> str:
    """The way out where the store is what refuses."""
    return (
        "mend that, then start the same recipe again: it reuses every stage, and keeps the run and its page; meanwhile "
        f"`modelpress report {run.name}@{run.pack}` draws one of what the pack itself says"
    )


def _later(run: RunReport) -> str:
    """The way out where it can't be drawn."""
    from modelpress.page.drawing import FIX

    if run.pack is None:
        return f"{FIX}; the numbers are with the runs of the stages in MLflow"
    return f"{FIX}; `modelpress report {run.name}@{run.pack}` draws it then, from the numbers that are kept"


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
