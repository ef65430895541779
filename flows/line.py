"""What a run of the line keeps while it runs: the tracked run, the baseline, a row per stage, the last word."""

from __future__ import annotations

import base64
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, TypeVar

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.utilities.urls import url_for

from flows import metrics, pages
from flows.result import (
    OptimizeResult,
    StageRow,
    format_bytes,
    format_quality,
    markdown,
    memory_notes,
    table,
    throughput,
)
from flows.watch import watched
from modelpress.config import OptimizeConfig
from modelpress.errors import ModelpressError, PageError
from modelpress.reports import (
    ArtifactRef,
    CompressReport,
    EvaluationReport,
    ProfileReport,
    Report,
    SourceReport,
    Stage,
    UploadReport,
)
from modelpress.settings import Settings, read_settings
from modelpress.store.local import local_errors
from registry import figures as registered_figures
from registry import leftovers, runs, sources
from registry.gates import Decision
from registry.lineage import Lineage
from tasks.evaluation import evaluate
from tasks.packs import INDEX, Provenance
from tasks.records import Finished, ReportT
from tasks.release import Registered
from tasks.runner import RunContext
from tasks.slices import crewed

DEFAULT_UI = "http://127.0.0.1:4200"
"""Where `prefect server start` shows the database of an ephemeral server."""


class Line:
    """The state of one run. Tasks never see it: they are told references and a `RunContext`."""

    is_trial: ClassVar[bool] = False
    """Whether it is one of several tries, of which nobody is told by name."""

    def __init__(self, config: OptimizeConfig, settings: Settings, run: runs.Run, flow_run_url: str) -> None:
        self.config, self.settings, self.run, self.flow_run_url = config, settings, run, flow_run_url
        self.key = re.sub(r"[^a-z0-9]+", "-", config.name)
        workload = sources.pin(settings, config.workload)
        if workload != config.workload:  # an alias, which may name another version by the end of the run
            run.tag("source_model", workload.model)
        self.reports_to_mlflow = settings.reports_to_mlflow(encrypted=config.upload.encrypt)
        self.context = RunContext(
            name=config.name, mlflow_run=run.id, workload=workload, gpu=config.gpu, reports=self.reports_to_mlflow
        )
        self.mlflow_url = runs.run_url(settings, run.id, run.experiment_id)
        self.links = {"MLflow run": self.mlflow_url} | ({"Prefect flow run": flow_run_url} if flow_run_url else {})
        self.published: UploadReport | None = None
        self.decision: Decision | None = None
        self._result: OptimizeResult | None = None
        self.rows: list[StageRow] = []
        self.reports: dict[str, Report] = {}
        self.evaluations: dict[str, EvaluationReport] = {}
        self.outputs: dict[str, ArtifactRef] = {}
        self.scores: dict[str, ArtifactRef] = {}
        self.recomputed: list[str] = []

    def judged(self, label: str, finished: Finished[ReportT], of: Stage | None = None) -> ArtifactRef:
        """Measure a stage's output against the source model, and hand it on if it is within the budget.

        Raises:
            BudgetExceededError: it is not; the row is in the table all the same.
        """
        from modelpress.evaluate import check_budget

        stage: Stage = of or finished.stage  # type: ignore[assignment]
        slug = re.sub(r"\W+", "-", label).strip("-")
        measured = evaluate(
            self.context,
            finished.output,
            self.config.evaluate,
            stage,
            slug,
            baseline=self.scores.get("source"),
            original=self.outputs.get("source" if stage in ("distill", "prune") else "source (onnx)"),
        )
        self._note(label, finished)
        self._note(f"evaluate {label}", measured)
        self.evaluations[label], self.scores[label] = measured.report, measured.outputs["scores"]
        self.rows.append(
            StageRow(
                stage=label,
                runtime=measured.report.runtime,
                quality=measured.report.quality,
                size_bytes=finished.output.size_bytes,
                attribution=measured.report.attribution,
                latency=measured.report.latency,
                seconds=finished.seconds + measured.seconds,
                reused=finished.reused and measured.reused,
            )
        )
        found = f"{measured.report.quality.metric} {format_quality(measured.report.quality)}"
        size = format_bytes(finished.output.size_bytes)
        get_run_logger().info("%s: %s, %s bytes", label, found, size, extra={"stage": label})
        check_budget(measured.report, self.config.evaluate)
        return finished.output

    def passed(self, label: str, finished: Finished[ReportT]) -> Finished[ReportT]:
        """Note a lossless stage."""
        self._note(label, finished)
        size = sum(ref.size_bytes for name, ref in finished.outputs.items() if name != INDEX)
        if isinstance(finished.report, UploadReport):
            size = finished.report.published_bytes
        self.rows.append(StageRow(stage=label, size_bytes=size, seconds=finished.seconds, reused=finished.reused))
        return finished

    def profiled(self, finished: Finished[ProfileReport]) -> None:
        """Note which resource binds the source model."""
        self._note("profile", finished)
        self.rows.append(StageRow(stage="profile", seconds=finished.seconds, reused=finished.reused))
        verdict = finished.report.verdict
        self.run.tag("bound_by", verdict.binds)
        get_run_logger().info("profile: bound by %s", verdict.reason, extra={"stage": "profile"})

    def provenance(self) -> Provenance:
        """What the manifest says of how the pack came to be: nothing in it changes when a run is repeated."""
        source = self.reports["source"]
        origin = {source.origin: source.origin_sha256} if isinstance(source, SourceReport) and source.origin else {}
        return Provenance(
            lineage={**origin, **{label: ref.sha256 for label, ref in self.outputs.items()}},
            reports={
                **{
                    label: _timeless(report)
                    for label, report in self.reports.items()
                    # A profile says nothing that would be the same when the same work is done again.
                    if not label.startswith("eval") and not isinstance(report, ProfileReport)
                },
                **{f"quality {label}": report.quality.metrics() for label, report in self.evaluations.items()},
            },
            scores=self.scores[self.served],
            source_scores=self.scores["source"],
            graph=self.outputs[self.served],
            source_bytes=self.outputs["source"].size_bytes,
        )

    def lineage(self) -> Lineage:
        """Where a new model version comes from."""
        source = self.reports["source"]
        return Lineage(
            outputs={label: ref.sha256 for label, ref in self.outputs.items()},
            source_model=source.origin if isinstance(source, SourceReport) else None,
            mlflow_run=self.run.id,
            mlflow_run_url=self.mlflow_url,
            flow_run_id=str(flow_run.id),
            flow_run_url=self.flow_run_url,
        )

    def headline(self) -> dict[str, str]:
        """The measured numbers that the gate and people read from the model version: text by tag."""
        served, source = self.evaluations[self.served], self.evaluations["source (onnx)"]
        return {
            served.quality.metric: f"{served.quality.value:.6f}",
            "throughput_per_second": f"{throughput(served):.3f}",
            "source_throughput_per_second": f"{throughput(source):.3f}",
            "speedup": f"{throughput(served) / throughput(source):.4f}",
            **_reasons(served),
        }

    def of_hardware(self) -> dict[str, str]:
        """What was measured of the served graph, by the class of the machine: text by tag."""
        return registered_figures.tags(self.evaluations[self.served])

    def delivered(self, published: UploadReport, registered: Registered, decision: Decision | None) -> None:
        """Make the result, and tell it to MLflow and to the log."""
        if registered.created:
            self.recomputed.append("register")
        speedup = float(self.headline()["speedup"])
        page = runs.version_url(self.settings, self.config.name, registered.number)
        self.links |= {f"model version {registered.number}": page}
        self.published, self.decision = published, decision
        self.run.tag("recomputed", ", ".join(self.recomputed) or "nothing")
        self.run.metrics(
            {
                "published_bytes": published.published_bytes,
                "compression_ratio": published.compression_ratio,
                "speedup": speedup,
                **{f"served.{key}": value for key, value in self.evaluations[self.served].metrics().items()},
            }
        )
        result = self._result = OptimizeResult(
            name=self.config.name,
            pack=published.pack,
            uri=published.uri,
            version=registered.number,
            source_bytes=published.source_bytes,
            published_bytes=published.published_bytes,
            compression_ratio=published.compression_ratio,
            speedup=speedup,
            stages=self.rows,
            recomputed=self.recomputed,
            decision=decision,
            graph=self.outputs[self.served].sha256,
            mlflow_run=self.run.id,
            mlflow_url=self.mlflow_url,
            flow_run_url=self.flow_run_url,
        )
        self._log_result()
        get_run_logger().info(
            "%s is published as %s: %s bytes, %.1f× fewer than the source, %.1f× its throughput; %s",
            result.name,
            result.pack,
            format_bytes(result.published_bytes),
            result.compression_ratio,
            speedup,
            f"recomputed {', '.join(self.recomputed)}" if self.recomputed else "everything reused, nothing recomputed",
        )

    def _log_result(self) -> None:
        """The result as an artifact in MLflow; where reports are not for it, without attributions of single samples."""
        without: Any = None if self.reports_to_mlflow else {"stages": {"__all__": {"attribution": {"examples"}}}}
        self.run.json("result.json", self.result.model_dump(mode="json", exclude=without))

    @property
    def result(self) -> OptimizeResult:
        """What was delivered; when the run has ended, with what became of its page."""
        assert self._result is not None, "delivered"
        return self._result

    def show(self) -> None:
        """Table, report, plots and page of the stages that ran, also when a later one failed.

        Whether the run has published is decided by now: what can't be drawn or kept is told, and fails nothing.
        """
        if not self.rows:
            return
        key = self.key
        create_table_artifact(table(self.rows), key=f"{key}-stages", description=f"Stages of `{self.config.name}`")
        with tempfile.TemporaryDirectory(prefix="modelpress-") as name:
            folder = Path(name)
            problems = self._draw(folder)
            text = self._text(problems)
            with local_errors(f"writing the report into {folder}", writing=True):
                (folder / "report.md").write_text(text, encoding="utf-8")
            # In the text, which Prefect's UIs show whole: an image artifact wants an address that each browser reaches.
            if (picture := folder / pages.STAGES).is_file():
                data = base64.b64encode(picture.read_bytes()).decode()
                text += f"\n![quality, bytes and speed by stage](data:image/png;base64,{data})\n"
            create_markdown_artifact(text, key=f"{key}-report", description=f"Report of `{self.config.name}`")
            pages.show_tables(key, self.config.name, self.reports)
            self.run.folder(folder)
        if problems:
            self._tell(problems)

    def _draw(self, folder: Path) -> list[PageError]:
        """The plots and the page, as files; what of them could not be drawn or kept."""
        told = self.reports_to_mlflow
        problems = pages.draw_plots(folder, self.config.name, self.rows, self.reports, layers=told)
        drawn = self._page()
        if told and drawn.page is not None:
            with local_errors(f"writing the page into {folder}", writing=True):
                (folder / pages.PAGE).write_text(drawn.page, encoding="utf-8")
        return [*problems, *drawn.problems]

    def _tell(self, problems: Sequence[PageError]) -> None:
        """What of the page could not be drawn or kept, to the log, to MLflow and in the result."""
        for problem in problems:
            cause = problem.__cause__
            # A terminal leaves out lines with an error of ours, which whoever started the run prints: nobody does this.
            trace = None if isinstance(cause, ModelpressError) else cause
            get_run_logger().error("%s", problem, exc_info=trace, extra={"stage": "report"})
        self.run.tag("page_problems", "\n".join(map(str, problems))[: runs.MAX_TAG_LENGTH])
        if self._result is not None:
            self._result = self._result.model_copy(update={"page_problems": [str(one) for one in problems]})
            self._log_result()

    def _text(self, problems: Sequence[PageError]) -> str:
        """The report in Markdown."""
        pack = f"Pack `{self.published.pack}`, `{self.published.uri}`\n\n" if self.published else ""
        if self.published and not self.reports_to_mlflow:
            pack += f"Its page: `modelpress report {self.config.name}@{self.published.pack}`\n\n"
        links = " · ".join(f"[{name}]({url})" for name, url in self.links.items())
        notes = [*memory_notes(self.reports), *(f"- **not done**: {' '.join(str(one).split())}" for one in problems)]
        noted = "\n".join([*notes, "", ""]) if notes else ""
        return f"# {self.config.name}\n\n{markdown(self.rows)}\n\n{noted}{pack}{links}\n"

    def _page(self) -> pages.Drawn:
        """The page of the run; where it published, kept beside the pack, unless nothing ran that is not told there."""
        error = sys.exception()
        told = pages.run_report(
            self.config,
            self.rows,
            self.reports,
            self.evaluations,
            published=self.published,
            served=self.served,
            stopped=f"{type(error).__name__}: {error}" if error is not None else None,
            links=self.links,
        )
        return pages.draw_and_keep(self.settings, told, keep=bool(self.recomputed))

    @property
    def served(self) -> str:
        """Label of the graph that is published."""
        return "quantize" if self.config.quantize else "plan" if self.config.plan else "export"

    def _note(self, label: str, finished: Finished[ReportT]) -> None:
        self.reports[label] = finished.report
        if "output" in finished.outputs:
            self.outputs[label] = finished.output
        if not finished.reused:
            self.recomputed.append(label)


LineT = TypeVar("LineT", bound=Line)


@contextmanager
def tracked(config: OptimizeConfig) -> Iterator[Line]:
    """The MLflow run of this flow run, linked both ways; it ends as the flow ends."""
    with tracked_as(Line, config) as line:
        yield line


@contextmanager
def tracked_as(kind: type[LineT], config: OptimizeConfig, further: Mapping[str, str] | None = None) -> Iterator[LineT]:
    """`tracked`, for a line that keeps something else; `further` are tags of the MLflow run."""
    settings, tags = read_settings(), {**flow_run_tags(), **(further or {})}
    with ExitStack() as stack:
        stack.enter_context(watched(config.name))
        stack.enter_context(crewed(config.workers))
        begun: list[Line] = []
        if not kind.is_trial:
            stack.push(partial(_tell_prometheus, settings, config.name, begun, time.time()))
        run = stack.enter_context(runs.parent_run(settings, config.name, config.model_dump(mode="json"), tags))
        if flow_run.run_count > 1:
            why = f"flow run {flow_run.name} ({flow_run.id}) was started again"
            leftovers.end_earlier(run.client, run.experiment_id, str(flow_run.id), run.id, why)
        line = kind(config, settings, run, tags["prefect.flow_run_url"])
        begun.append(line)
        create_link_artifact(
            link=line.mlflow_url,
            link_text=f"MLflow run {run.id}",
            key=f"{line.key}-mlflow",
            description="Parameters, metrics, plots and reports of this run",
        )
        stack.callback(line.show)
        yield line


def _tell_prometheus(
    settings: Settings,
    name: str,
    begun: list[Line],
    began: float,
    kind: type[BaseException] | None,
    _error: BaseException | None,
    _trace: TracebackType | None,
) -> None:
    """Say how a run ended, also one that failed before it had a line."""
    if settings.metrics is not None:
        line = begun[0] if begun else None
        told = (line.rows, line.published, line.decision) if line else ((), None, None)
        metrics.write(settings.metrics, name, *told, began=began, success=kind is None)


def flow_run_tags() -> dict[str, str]:
    """What an MLflow run says of the flow run that it belongs to."""
    return {
        leftovers.FLOW_RUN_TAG: str(flow_run.id),
        "prefect.flow_run_name": str(flow_run.name),
        "prefect.flow_run_url": url_for("flow-run", obj_id=flow_run.id, default_base_url=DEFAULT_UI) or "",
    }


def _reasons(served: EvaluationReport) -> dict[str, str]:
    found = served.attribution
    ends = {"agreement": found.agreement, "low": found.low, "high": found.high} if found else {}
    return {f"attribution_{end}": f"{value:.6f}" for end, value in ends.items()}


def _timeless(report: Report) -> dict[str, Any]:
    """The numbers of a report without those that differ when the same work is done again; of coded tensors, each."""
    drop: tuple[str, ...] = ("seconds", "per_second", "memory")
    numbers: dict[str, Any] = {
        key: value for key, value in report.metrics().items() if not any(word in key for word in drop)
    }
    if isinstance(report, CompressReport):
        numbers["tensors"] = [row.model_dump(mode="json", exclude={"decode_seconds"}) for row in report.tensors]
    return numbers
