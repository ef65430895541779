"""Stages whose training is spread over processes: started here, or by others, watched from here."""

from __future__ import annotations

from typing import Literal

from prefect.logging import get_run_logger

from modelpress.config import DistillConfig, PruneConfig
from modelpress.errors import ConfigError
from modelpress.parallel import launch
from modelpress.parallel.jobs import Job
from modelpress.progress import Progress
from modelpress.reports import ArtifactRef, ParallelReport, trainings
from modelpress.resume import open_shelf
from tasks.records import ReportT
from tasks.runner import RunContext, find_source
from tasks.trainings import StageShelf


def spread(
    context: RunContext,
    stage: Literal["distill", "prune"],
    config: DistillConfig | PruneConfig,
    model: ArtifactRef,
    report_type: type[ReportT],
    progress: Progress,
) -> tuple[bytes, ReportT]:
    """Run a stage by ranks, within `tasks.runner.run_stage`: the output's bytes and the report.

    Raises:
        ConfigError: the ranks are elsewhere, and the model is in a folder of this machine that MLflow's was fetched to.
        ModelpressError: what a rank refused; see `modelpress.parallel.launch`.
    """
    shelf = open_shelf()
    assert isinstance(shelf, StageShelf)
    workload, states = context.workload, shelf.lend()
    found = find_source(workload)
    if found is not None:
        workload = workload.model_copy(update={"model": str(found.folder)})
    job = Job(stage=stage, workload=workload, config=config, model=model, states=states)
    if job.parallel.where == "here":
        output, result = launch.run_here(job, progress)
    elif found is not None:
        raise ConfigError(
            f"handing {stage} to ranks on other machines",
            found=f"the source model {context.workload.model}, which MLflow keeps",
            expected="a model that each machine reads by itself",
            fix="set parallel.where to here, or workload.model to a folder or a name that all machines have",
        )
    else:

        def say(text: str) -> None:
            get_run_logger().warning("%s: %s", stage, text, extra={"stage": stage})

        output, result = launch.wait_elsewhere(job, states.folder, progress, say, reuse=states.reuse)
    for text in result.told:
        shelf.tell(text)
    report = report_type.model_validate(result.report)
    for training in trainings(report):
        _warn(stage, training.parallel)
    return output, report


def _warn(stage: str, report: ParallelReport | None) -> None:
    log, extra = get_run_logger(), {"stage": stage}
    if report is not None and report.restarts:
        log.warning("%s: a rank died, and all were started again, %d times", stage, report.restarts, extra=extra)
    if report is not None and not report.weights_agree:
        text = "%s: the ranks ended with weights of other bits, the first's are kept: are their machines alike?"
        log.warning(text, stage, extra=extra)
