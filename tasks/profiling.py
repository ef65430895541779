"""Which resource binds the source model."""

from __future__ import annotations

from collections.abc import Mapping

from prefect import task
from prefect.cache_policies import NO_CACHE

from modelpress.config import CompressConfig, GpuConfig, ProfileConfig
from modelpress.progress import Progress
from modelpress.providers import on_gpu
from modelpress.reports import ArtifactRef, ProfileReport
from modelpress.settings import read_settings
from tasks.evaluation import host_fingerprint
from tasks.records import Finished
from tasks.runner import RunContext, fetch_checkpoint, open_workload, run_stage


@task(name="profile", task_run_name="profile", cache_policy=NO_CACHE)
def profile(
    context: RunContext,
    model: ArtifactRef,
    graph: ArtifactRef,
    config: ProfileConfig,
    compression: CompressConfig | None,
) -> Finished[ProfileReport]:
    """Measure where the time, the bytes, the joules and the money of a model go on this machine.

    `graph` is what `model` was exported to; the pack that is started anew is coded by
    `compression`."""
    settings = read_settings()
    hardware, options = settings.hardware or None, settings.options_of(config.provider)
    if compression is not None:  # that pack stands alone
        compression = compression.model_copy(update={"base": None})

    def work(progress: Progress) -> tuple[Mapping[str, bytes], ProfileReport]:
        from modelpress.checkpoint import to_module
        from modelpress.profile.run import Subject
        from modelpress.profile.run import profile as run

        workload = open_workload(context.workload, context.mlflow_run)
        if config.runtime == "torch":
            checkpoint = fetch_checkpoint(model)
            module = to_module(checkpoint, workload)
            subject = Subject(context.name, checkpoint, workload.example, module=module)
        else:
            subject = Subject(context.name, fetch_checkpoint(graph), workload.example)
        report = run(subject, config, compression, progress)
        return {}, report.model_copy(update={"hardware": hardware})

    extra = {
        "host": host_fingerprint(),
        "compress": compression.fingerprint() if compression else None,
        **({"hardware": hardware} if hardware else {}),
        **({"provider_options": options} if options else {}),
    }
    return run_stage(
        context,
        "profile",
        ProfileReport,
        work,
        inputs=[model if config.runtime == "torch" else graph],
        config=config,
        extra=extra,
        splits=["calibration"],
        gpu=(context.gpu or GpuConfig()) if on_gpu(config.provider) else None,
    )
