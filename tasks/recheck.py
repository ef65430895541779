"""Measuring what is published again: are the bytes that are served still as good as when they passed the gate?"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from mlflow import MlflowClient
from mlflow.entities import Run
from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from modelpress.config import GateConfig, OptimizeConfig, WorkloadConfig, parse_config
from modelpress.errors import ModelpressError
from modelpress.manifest import Manifest
from modelpress.progress import Progress
from modelpress.reports import EvaluationReport, Report
from modelpress.scores import Scored
from modelpress.settings import read_settings
from modelpress.store.base import Store, open_store
from registry import figures, gates, runs, versions
from registry.gates import Decision
from registry.versions import Version
from tasks.progress import StageProgress
from tasks.runner import open_workload


class Rechecked(Report):
    """What a published pack is worth today."""

    name: str
    """Name of the pack and of the registered model."""
    pack: str
    """Digest of what was measured."""
    version: str
    """Number of the registered model version that carries it."""
    evaluation: EvaluationReport
    """Measured on the evaluation split, from bytes that were read and verified for it."""
    decision: Decision
    """What the gate says of it; `promote` is whether it may stay."""
    mlflow_run: str
    """Id of the MLflow run that holds all of this."""
    mlflow_url: str
    """Its page."""


@task(name="recheck", task_run_name="recheck-{name}", cache_policy=NO_CACHE)
def recheck(name: str, alias: str, pack: str, gate: GateConfig | None, tags: Mapping[str, str]) -> Rechecked:
    """Download a pack, verify it, measure it on held-out data, judge it, and write that beside its model version.

    Every byte comes from the store, whatever a cache on this machine holds.

    Args:
        name: of the pack and of the registered model.
        alias: what led to the pack.
        pack: its digest.
        gate: the conditions; None takes those of the pack's own config.
        tags: of the MLflow run, beside the pack's.
    """
    from modelpress import load

    settings = read_settings()
    store = open_store(settings.store_uri, settings)
    runs.check_server(settings.mlflow_uri)
    client = runs.open_client(settings)
    with runs.named_errors(settings.mlflow_uri):
        version = versions.carrying(client, name, pack)
        origin = client.get_run(version.run_id)
    about = {"pack": pack, "model_version": version.number, "alias": alias, **tags}
    with StageProgress("recheck") as progress:
        manifest = load.load_manifest(store, name, pack)
        config = parse_config(manifest.config, origin=f"the config of pack {pack}")
        gate = gate or config.gate
        asked = {"gate": gate.model_dump(mode="json"), "evaluate": config.evaluate.model_dump(mode="json")}
        with runs.parent_run(settings, name, asked, about) as run:
            data = _as_then(config.workload, origin)
            try:
                report, found, published = _measure(store, manifest, pack, config, data, run.id, progress)
                report = report.model_copy(update={"hardware": settings.hardware or None})
            except ModelpressError:
                _tell(client, version, run, "error", {})  # nobody may take an earlier verdict for today's
                raise
            decision = gates.recheck(found, published, gate)
            run.metrics(report.metrics())
            if settings.reports_to_mlflow(encrypted=manifest.encryption is not None):
                run.json("report.json", report.model_dump(mode="json"))
            run.json("decision.json", decision.model_dump(mode="json"))
            numbers = {f"evaluated.{report.quality.metric}": f"{report.quality.value:.6f}"}
            _tell(client, version, run, decision.verdict, {**numbers, **figures.tags(report)})
    get_run_logger().info("recheck: %s: %s", decision.verdict, "; ".join(decision.reasons), extra={"stage": "recheck"})
    return Rechecked(
        name=name,
        pack=pack,
        version=version.number,
        evaluation=report,
        decision=decision,
        mlflow_run=run.id,
        mlflow_url=runs.run_url(settings, run.id, run.experiment_id),
    )


@task(name="show", task_run_name="show", cache_policy=NO_CACHE)
def show(found: Rechecked) -> None:
    """The verdict as a page in Prefect, and the way to the MLflow run."""
    key = found.name.replace(".", "-").replace("_", "-")
    quality, rows = found.evaluation.quality, found.evaluation.latency
    lines = [
        f"# {found.name}, version {found.version}: {found.decision.verdict}",
        "",
        f"Pack `{found.pack}`, every byte read from the store and verified.",
        "",
        f"- {quality.metric} {quality.value:.4f} [{quality.low:.4f}, {quality.high:.4f}] on {quality.samples} samples",
        *[f"- {reason}" for reason in found.decision.reasons],
        *[f"- batch {row.batch_size}: p50 {row.p50_seconds * 1000:.2f} ms, this machine" for row in rows],
        "",
    ]
    create_markdown_artifact("\n".join(lines), key=f"{key}-evaluated", description=f"`{found.name}` measured again")
    create_link_artifact(
        link=found.mlflow_url, link_text=f"MLflow run {found.mlflow_run}", key=f"{key}-evaluated-mlflow"
    )


def _measure(
    store: Store,
    manifest: Manifest,
    pack: str,
    config: OptimizeConfig,
    data: WorkloadConfig,
    run: str,
    progress: Progress,
) -> tuple[EvaluationReport, Scored, Mapping[str, Scored]]:
    """The report, today's scores, and those that the pack was published with."""
    from modelpress import load, scores
    from modelpress.evaluate import evaluate
    from modelpress.workload import samples_digest

    published = scores.of_pack(manifest, load.fetcher(store, manifest))
    _, checkpoint = load.load_checkpoint(store, manifest.name, pack, progress)
    workload = open_workload(data, run)
    source = published.get("source")
    before = source if source is not None and source.samples == samples_digest(workload) else None
    report, found = evaluate(
        checkpoint, workload, config.evaluate, "upload", before, manifest.published_bytes, progress
    )
    return report, found, published


def _tell(client: MlflowClient, version: Version, run: runs.Run, verdict: str, numbers: Mapping[str, str]) -> None:
    """Write on the run how it ended, and on the model version that, when, where it stands in full, and the numbers."""
    run.tag("gate.verdict", verdict)
    about = {
        "evaluated.verdict": verdict,
        "evaluated.at": datetime.now(UTC).isoformat(timespec="seconds"),
        "evaluated.run_id": run.id,
    }
    versions.annotate(client, version, {**about, **numbers})


def _as_then(config: WorkloadConfig, origin: Run) -> WorkloadConfig:
    """The workload as it was at publication: a model that MLflow keeps by its version, not by an alias that moves."""
    return config.model_copy(update={"model": origin.data.tags.get("source_model", config.model)})
