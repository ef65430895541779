"""How long a graph's calls take with nobody beside: what is measured while other processes compute compares with
nothing."""

from __future__ import annotations

from collections.abc import Mapping

from prefect import task
from prefect.cache_policies import NO_CACHE

from modelpress.config import EvaluateConfig, GpuConfig
from modelpress.progress import Progress
from modelpress.providers import on_gpu
from modelpress.reports import ArtifactRef, LatencyReport, Report
from modelpress.settings import read_settings
from tasks.evaluation import host_fingerprint
from tasks.records import Finished
from tasks.runner import RunContext, fetch_checkpoint, open_workload, run_stage


class TimedReport(Report):
    """Latencies of a graph."""

    latency: list[LatencyReport]
    """One per batch size."""

    def metrics(self) -> dict[str, float]:
        """``latency.b<batch>.*``, as an evaluation has them."""
        return {
            f"latency.b{row.batch_size}.{key}": value for row in self.latency for key, value in row.metrics().items()
        }


@task(name="latency", task_run_name="{label}", cache_policy=NO_CACHE)
def time_graph(context: RunContext, graph: ArtifactRef, config: EvaluateConfig, label: str) -> Finished[TimedReport]:
    """Time a graph as an evaluation does, without the quality."""

    def work(progress: Progress) -> tuple[Mapping[str, bytes], TimedReport]:
        from modelpress.evaluate import measure_latency, running

        workload, found = open_workload(context.workload, context.mlflow_run), []
        with running(fetch_checkpoint(graph), workload, config.provider, config.threads) as run:
            for done, size in enumerate(config.batch_sizes):
                progress(done, len(config.batch_sizes), f"latency at batch {size}")
                found.append(measure_latency(run, workload.example(size), size, config.latency_seconds))
        return {}, TimedReport(latency=found)

    settings = read_settings()
    hardware, options = settings.hardware or None, settings.options_of(config.provider)
    return run_stage(
        context,
        "latency",
        TimedReport,
        work,
        inputs=[graph],
        config=config,
        label=label,
        extra={
            "host": host_fingerprint(),
            **({"hardware": hardware} if hardware else {}),
            **({"provider_options": options} if options else {}),
        },
        gpu=(context.gpu or GpuConfig()) if on_gpu(config.provider) else None,
    )
