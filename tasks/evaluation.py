"""What a model is worth after a stage."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from prefect import task
from prefect.cache_policies import NO_CACHE

from modelpress.config import EvaluateConfig
from modelpress.progress import Progress
from modelpress.reports import ArtifactRef, EvaluationReport, Stage
from modelpress.store.artifacts import load_artifact
from tasks.records import Finished
from tasks.runner import RunContext, fetch_checkpoint, open_workload, run_stage

if TYPE_CHECKING:
    from modelpress.workload import Workload


@task(name="evaluate", task_run_name="evaluate-{label}", cache_policy=NO_CACHE)
def evaluate(
    context: RunContext,
    model: ArtifactRef,
    config: EvaluateConfig,
    stage: Stage,
    label: str,
    baseline: ArtifactRef | None = None,
) -> Finished[EvaluationReport]:
    """Measure the output of `stage`, paired with the `baseline` scores."""

    def work(progress: Progress) -> tuple[Mapping[str, bytes], EvaluationReport]:
        from modelpress.evaluate import evaluate as run
        from registry import scores as files

        workload = open_workload(context.workload)
        before = files.load(load_artifact(baseline))["scores"].scores if baseline else None
        checkpoint = fetch_checkpoint(model)
        report, scores = run(checkpoint, workload, config, stage, before, model.size_bytes, progress)
        samples = samples_digest(workload)
        return {"scores": files.dump({"scores": scores}, samples=samples, metric=workload.metric)}, report

    return run_stage(
        context,
        "evaluate",
        EvaluationReport,
        work,
        inputs=[model, *([baseline] if baseline else [])],
        config=config,
        label=f"evaluate-{label}",
        extra={"stage": stage},
    )


def samples_digest(workload: Workload) -> str:
    """sha256 (hex) of the evaluation samples and targets in their order: scores pair only where it is the same."""
    digest = hashlib.sha256()
    for batch in workload.batches("evaluation", 256):
        tensors = dict(batch.inputs) if batch.targets is None else {**batch.inputs, "": batch.targets}
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)};".encode())
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
