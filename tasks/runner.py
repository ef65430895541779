"""How every stage runs: look for its record, else work and record; log it to MLflow; say what happened."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prefect.logging import get_run_logger

from modelpress import memory
from modelpress.config import Config, GpuConfig, WorkloadConfig
from modelpress.progress import Progress
from modelpress.reports import ArtifactRef, Report, trainings
from modelpress.resume import kept_on
from modelpress.settings import read_settings
from modelpress.store.artifacts import load_artifact, save_artifact
from modelpress.store.base import Store, open_store
from registry import runs, sources
from tasks.devices import placed
from tasks.progress import StageProgress
from tasks.records import Finished, Record, ReportT, find_record, read_report, save_record, stage_key
from tasks.telemetry import span
from tasks.trainings import StageShelf

if TYPE_CHECKING:
    from modelpress.checkpoint import Checkpoint
    from modelpress.workload import Split, Workload


class RunContext(Report):
    """What every task of one flow run is told."""

    name: str
    """Name of the pack and of the registered model."""
    mlflow_run: str
    """Id of the parent run; each stage logs to a child of it."""
    workload: WorkloadConfig
    """The model, the data and the metric; a model of MLflow's by its version, never by an alias."""
    gpu: GpuConfig | None = None
    """What a stage that computes on a GPU needs; None: none does."""
    reports: bool = True
    """Whether MLflow gets the stages' reports, in the clear."""


OUT_OF_MEMORY = "run the stage where there is more memory, or give it less: smaller batches, fewer samples"
Work = Callable[[Progress], tuple[Mapping[str, bytes], ReportT]]
"""Does a stage's work: outputs by name, and the report."""


def run_stage(
    context: RunContext,
    stage: str,
    report_type: type[ReportT],
    work: Work[ReportT],
    *,
    inputs: Sequence[ArtifactRef] = (),
    config: Config | None = None,
    label: str = "",
    extra: Mapping[str, Any] | None = None,
    valid: Callable[[ReportT], bool] = lambda _: True,
    splits: Collection[Split] = (),
    gpu: GpuConfig | None = None,
) -> Finished[ReportT]:
    """Run a stage, or take what an earlier run finished.

    Args:
        context: the flow run.
        stage: the stage.
        report_type: of its report.
        work: the work.
        inputs: what it reads.
        config: the stage's config.
        label: how it is shown; empty is the stage's name.
        extra: whatever else decides the output.
        valid: whether what an earlier report speaks of still stands.
        splits: of the data that it reads, as its run's inputs in MLflow.
        gpu: held while the work is done; None where it computes on the CPU.
    """
    settings, label = read_settings(), label or stage
    store = open_store(settings.work_uri, settings)
    fingerprint = config.fingerprint() if config else ""
    identity = open_workload(context.workload, context.mlflow_run).identity()
    key = stage_key(stage, inputs=inputs, config=fingerprint, identity=identity, extra=extra)
    values = config.model_dump(mode="json") if config else {}
    with (
        span(f"stage {label}", {"modelpress.stage": label, "modelpress.stage.key": key}) as opened,
        runs.child_run(settings, context.mlflow_run, label, values, splits) as child,
    ):
        record = find_record(store, stage, key) if settings.reuse else None
        report = read_report(store, record, report_type) if record is not None else None
        reused = report is not None and valid(report)
        if record is None or report is None or not reused:
            replace = record is not None or not settings.reuse
            shelf = StageShelf(store, stage, key, settings, child.tag)
            with placed(gpu, label):
                record = _work(store, shelf, label, work, replace=replace)
            report = read_report(store, record, report_type)
        finished = Finished(stage, record.outputs, report, record.seconds, reused)
        if opened is not None:
            opened.set_attributes(
                {
                    "modelpress.stage.reused": reused,
                    "modelpress.stage.seconds": record.seconds,
                    "modelpress.stage.output_bytes": sum(ref.size_bytes for ref in record.outputs.values()),
                    "mlflow.run_id": child.id,
                }
            )
        if context.reports:
            child.json("report.json", finished.report.model_dump(mode="json"))
        _log(child, label, finished, {"stage_key": key, "inputs_sha256": ", ".join(ref.sha256 for ref in inputs)})
    return finished


@functools.lru_cache(maxsize=2)
def _open_workload(config: str, _run: str) -> Workload:
    from modelpress.workload import load_workload

    checked = WorkloadConfig.model_validate_json(config)
    if found := find_source(checked):
        checked = checked.model_copy(update={"model": str(found.folder)})
    return load_workload(checked)


def find_source(config: WorkloadConfig) -> sources.Source | None:
    """The folder of a model that MLflow keeps, fetched where it is not here; None where the model is elsewhere."""
    return sources.fetch(read_settings(), config.model) if sources.is_mlflow(config.model) else None


def open_workload(config: WorkloadConfig, run: str = "") -> Workload:
    """The workload of a config; a process loads it once for each `run`, however many stages that has.

    The next flow run reads it afresh: data under the same path may have changed.
    """
    return _open_workload(config.model_dump_json(), run)


def fetch_checkpoint(ref: ArtifactRef) -> Checkpoint:
    """The checkpoint behind a reference, its digest checked."""
    from modelpress.checkpoint import Checkpoint

    return Checkpoint.from_bytes(load_artifact(ref))


def _work(store: Store, shelf: StageShelf, label: str, work: Work[ReportT], *, replace: bool) -> Record:
    started = time.perf_counter()
    with StageProgress(label) as progress, kept_on(shelf), memory.named(f"stage {label}", OUT_OF_MEMORY):
        outputs, report = work(progress)
    saved = {name: save_artifact(store, data, replace=replace) for name, data in outputs.items()}
    seconds = time.perf_counter() - started
    values = report.model_dump(mode="json")
    record = Record(stage=shelf.stage, key=shelf.key, outputs=saved, report=values, seconds=seconds)
    recorded = save_record(store, record, replace=replace)
    shelf.clear()
    return recorded


def _log(child: runs.Run, label: str, finished: Finished[ReportT], origin: Mapping[str, str]) -> None:
    child.metrics({**finished.report.metrics(), "stage_seconds": finished.seconds})
    child.series(finished.report.series())
    made = {"output_sha256": finished.output.sha256} if "output" in finished.outputs else {}
    child.tags({"reused": str(finished.reused).lower(), **made, **origin})
    how = f"reused (took {finished.seconds:.1f} s when it ran)" if finished.reused else f"{finished.seconds:.1f} s"
    get_run_logger().info("%s: %s", label, how, extra={"stage": label})
    for training in trainings(finished.report):
        for found in training.memory_errors:
            cut = "%s: memory ran out, and batches were cut from there on: %s"
            get_run_logger().warning(cut, label, found, extra={"stage": label})
