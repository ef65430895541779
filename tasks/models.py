"""The stages that make and change a model: source, distill, prune, export, quantize, plan."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from prefect import task
from prefect.cache_policies import NO_CACHE

from modelpress.config import (
    CompressConfig,
    DistillConfig,
    ExportConfig,
    PlanConfig,
    PruneConfig,
    QuantizeConfig,
    TrainConfig,
)
from modelpress.progress import Progress
from modelpress.reports import (
    ArtifactRef,
    DistillReport,
    ExportReport,
    PlanReport,
    PruneReport,
    QuantizeReport,
    SourceReport,
)
from modelpress.settings import read_settings
from modelpress.store.base import open_store
from tasks import slices
from tasks.evaluation import host_fingerprint
from tasks.parallel import spread
from tasks.records import Finished
from tasks.runner import RunContext, fetch_checkpoint, find_source, open_workload, run_stage

if TYPE_CHECKING:
    from modelpress.workload import Split

# Prefect's own cache would pickle inputs to hash them, and would not see a changed library; tasks/records.py keys by
# content. The library is imported inside the tasks, so that a form can be built where torch is not installed.


@task(name="source", task_run_name="source", cache_policy=NO_CACHE)
def source(context: RunContext) -> Finished[SourceReport]:
    """The model as the user gave it, after proof that no sample stands in two splits."""

    def work(progress: Progress) -> tuple[Mapping[str, bytes], SourceReport]:
        from modelpress.checkpoint import from_module

        workload = open_workload(context.workload, context.mlflow_run)
        module = workload.source(progress)
        data = from_module(module).to_bytes()
        parameters = sum(parameter.numel() for parameter in module.parameters())
        found = find_source(context.workload)
        report = SourceReport(
            parameters=parameters,
            size_bytes=len(data),
            trained=workload.trains_source,
            origin=found.uri if found else None,
            origin_sha256=found.sha256 if found else None,
        )
        return {"output": data}, report

    from modelpress.workload import check_disjoint
    from registry import datasets, runs

    settings, workload = read_settings(), open_workload(context.workload, context.mlflow_run)
    # On each run, also where the model is taken from an earlier one: data may change without `identity` saying so.
    found = check_disjoint(workload)
    splits: dict[str, tuple[int, str]] = {split: (one.samples, one.sha256) for split, one in found.items()}
    datasets.log(runs.open_client(settings), context.mlflow_run, context.workload, splits)
    used: list[Split] = ["train"] if workload.trains_source else []
    gpu = context.gpu if workload.trains_source else None
    return run_stage(context, "source", SourceReport, work, config=context.workload, splits=used, gpu=gpu)


@task(name="distill", task_run_name="distill", cache_policy=NO_CACHE)
def distill(context: RunContext, model: ArtifactRef, config: DistillConfig) -> Finished[DistillReport]:
    """Train a smaller student on the model's answers."""

    def work(progress: Progress) -> tuple[Mapping[str, bytes], DistillReport]:
        if config.train.parallel.processes > 1:
            output, together = spread(context, "distill", config, model, DistillReport, progress)
            return {"output": output}, together
        from modelpress.checkpoint import from_module, to_module
        from modelpress.distill import distill as run

        workload = open_workload(context.workload, context.mlflow_run)
        student, report = run(to_module(fetch_checkpoint(model), workload), workload, config, progress)
        return {"output": from_module(student, report.architecture).to_bytes()}, report

    splits = _read(config.train)
    return run_stage(
        context, "distill", DistillReport, work, inputs=[model], config=config, splits=splits, gpu=context.gpu
    )


@task(name="prune", task_run_name="prune", cache_policy=NO_CACHE)
def prune(context: RunContext, model: ArtifactRef, config: PruneConfig) -> Finished[PruneReport]:
    """Remove weights, and recover."""

    def work(progress: Progress) -> tuple[Mapping[str, bytes], PruneReport]:
        if config.recovery is not None and config.recovery.parallel.processes > 1:
            output, together = spread(context, "prune", config, model, PruneReport, progress)
            return {"output": output}, together
        from modelpress.checkpoint import from_module, to_module
        from modelpress.prune import prune_

        workload = open_workload(context.workload, context.mlflow_run)
        checkpoint = fetch_checkpoint(model)
        module = to_module(checkpoint, workload)
        report = prune_(module, workload, config, progress)
        return {"output": from_module(module, checkpoint.metadata["architecture"]).to_bytes()}, report

    splits = _read(config.recovery)
    if config.method != "magnitude":  # the one method that looks at no data
        splits.add("calibration")
    return run_stage(context, "prune", PruneReport, work, inputs=[model], config=config, splits=splits)


@task(name="export", task_run_name="{label}", cache_policy=NO_CACHE)
def export(
    context: RunContext, model: ArtifactRef, config: ExportConfig, label: str = "export"
) -> Finished[ExportReport]:
    """Write the ONNX graph."""

    def work(_progress: Progress) -> tuple[Mapping[str, bytes], ExportReport]:
        from modelpress.checkpoint import to_module
        from modelpress.export import export as run

        workload = open_workload(context.workload, context.mlflow_run)
        graph, report = run(to_module(fetch_checkpoint(model), workload), workload, config)
        return {"output": graph.to_bytes()}, report

    return run_stage(context, "export", ExportReport, work, inputs=[model], config=config, label=label)


@task(name="quantize", task_run_name="quantize", cache_policy=NO_CACHE)
def quantize(
    context: RunContext,
    graph: ArtifactRef,
    config: QuantizeConfig,
    model: ArtifactRef,
    export_config: ExportConfig,
) -> Finished[QuantizeReport]:
    """Turn weights and activations into integers, or weights into indices; `model` is what `graph` was exported from.

    Methods that train the torch model export it again, as `export_config` says. `config.scales_from` is a digest here.
    """
    settings = read_settings()

    def work(progress: Progress) -> tuple[Mapping[str, bytes], QuantizeReport]:
        from modelpress import load
        from modelpress.checkpoint import to_module
        from modelpress.quantize import quantize as run
        from modelpress.quantize.from_module import quantize_module

        workload = open_workload(context.workload, context.mlflow_run)
        checkpoint, earlier = fetch_checkpoint(graph), None
        if config.scales_from is not None:
            store = open_store(settings.store_uri, settings)
            _, earlier = load.load_checkpoint(store, context.name, config.scales_from)
        if config.needs_module:
            module = to_module(fetch_checkpoint(model), workload)
            quantized, report = quantize_module(module, checkpoint, workload, config, export_config, progress)
        else:
            workers = slices.crew()
            observer = slices.Observing(workers, context, progress) if workers else None
            quantized, report = run(checkpoint, workload, config, progress, earlier, observer)
        return {"output": quantized.to_bytes()}, report

    inputs = [graph, model] if config.needs_module else [graph]
    extra = {"export": export_config.fingerprint()} if config.needs_module else None
    splits = _read(config.recovery, "calibration")
    return run_stage(
        context, "quantize", QuantizeReport, work, inputs=inputs, config=config, extra=extra, splits=splits
    )


@task(name="plan", task_run_name="plan", cache_policy=NO_CACHE)
def plan(
    context: RunContext,
    graph: ArtifactRef,
    config: PlanConfig,
    compression: CompressConfig | None,
    model: ArtifactRef,
    export_config: ExportConfig,
) -> Finished[PlanReport]:
    """Give each weight a form of its own within one budget; `compression` is how the pack will be coded. `model` is
    what the graph was exported from, as `export_config` says; it is read where the plan trains it."""
    if compression is not None:  # forms are weighed by what they take in a pack that stands alone
        compression = compression.model_copy(update={"base": None})

    def work(progress: Progress) -> tuple[Mapping[str, bytes], PlanReport]:
        from modelpress.checkpoint import to_module
        from modelpress.plan import measured, opened, settle
        from modelpress.plan import plan as run
        from modelpress.plan.recovery import plan_module

        workload = open_workload(context.workload, context.mlflow_run)
        checkpoint = fetch_checkpoint(graph)
        if config.needs_module:
            module = to_module(fetch_checkpoint(model), workload)
            planned, report = plan_module(module, checkpoint, workload, config, export_config, compression, progress)
        elif (workers := slices.crew()) and config.objective == "bytes":
            survey = opened(checkpoint, workload, config, compression)
            slices.sensitivities(workers, context, graph, survey, progress)
            points = functools.partial(slices.front, workers, context, graph, survey, progress)
            planned, report = settle(measured(survey, progress), config.max_disagreement, progress, points)
        else:
            planned, report = run(checkpoint, workload, config, compression, progress)
        return {"output": planned.to_bytes()}, report

    extra: dict[str, object] = {"compress": compression.fingerprint() if compression else None}
    if config.objective == "seconds":
        extra["host"] = host_fingerprint()
    if config.needs_module:
        extra["export"] = export_config.fingerprint()
    inputs = [graph, model] if config.needs_module else [graph]
    splits = _read(config.recovery, "calibration", "evaluation")
    return run_stage(context, "plan", PlanReport, work, inputs=inputs, config=config, extra=extra, splits=splits)


def _read(training: TrainConfig | None, *further: Split) -> set[Split]:
    """The splits that a stage reads: its training's, and further ones."""
    splits = set(further)
    if training is not None:
        splits |= {"train", "calibration"} if training.early_stop_epochs else {"train"}
    return splits
