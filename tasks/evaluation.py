"""What a model is worth after a stage."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from modelpress.config import EvaluateConfig, GpuConfig
from modelpress.cores import usable_cores
from modelpress.progress import Progress
from modelpress.providers import on_gpu
from modelpress.reports import ArtifactRef, EvaluationReport, Stage
from modelpress.settings import read_settings
from modelpress.store.artifacts import load_artifact
from tasks import slices
from tasks.records import Finished
from tasks.runner import RunContext, fetch_checkpoint, open_workload, run_stage


@task(name="evaluate", task_run_name="evaluate-{label}", cache_policy=NO_CACHE)
def evaluate(
    context: RunContext,
    model: ArtifactRef,
    config: EvaluateConfig,
    stage: Stage,
    label: str,
    baseline: ArtifactRef | None = None,
    original: ArtifactRef | None = None,
) -> Finished[EvaluationReport]:
    """Measure the output of `stage`, paired with the `baseline` scores; compare its reasons with the `original`'s."""

    settings = read_settings()
    hardware, options = settings.hardware or None, settings.options_of(config.provider)

    def work(progress: Progress) -> tuple[Mapping[str, bytes], EvaluationReport]:
        from modelpress import scores
        from modelpress.evaluate import evaluate as run

        workload = open_workload(context.workload, context.mlflow_run)
        before = scores.load(load_artifact(baseline))["scores"] if baseline else None
        checkpoint = fetch_checkpoint(model)
        source = fetch_checkpoint(original) if original and config.attribution_samples else None
        workers = slices.crew()
        answers = slices.answers(workers, context, model, progress) if workers else None
        report, scored = run(checkpoint, workload, config, stage, before, model.size_bytes, progress, source, answers)
        return {"scores": scores.dump({"scores": scored})}, report.model_copy(update={"hardware": hardware})

    # Torch modules are measured on the CPU; a graph where its provider computes, and never beside somebody unasked.
    in_graph = label not in ("source", "distill", "prune")
    return run_stage(
        context,
        "evaluate",
        EvaluationReport,
        work,
        inputs=[model, *(ref for ref in (baseline, original) if ref)],
        config=config,
        label=f"evaluate-{label}",
        extra={
            "stage": stage,
            "host": host_fingerprint(),
            **({"hardware": hardware} if hardware else {}),
            **({"provider_options": options} if options and in_graph else {}),
        },
        splits=["evaluation"],
        gpu=(context.gpu or GpuConfig()) if in_graph and on_gpu(config.provider) else None,
    )


@functools.cache
def host_fingerprint() -> dict[str, str | int]:
    """What latencies hang on beside the model: two machines that share a work store each measure for themselves."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "accelerator": torch.cuda.get_device_name() if cuda else "none",
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """Model of the processor; what Python knows of it where the kernel does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()
