"""The lossless stages: compress, shard, upload."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from modelpress import keys
from modelpress.config import CompressConfig, OptimizeConfig, ShardConfig
from modelpress.progress import Progress
from modelpress.reports import ArtifactRef, CompressReport, Report, ShardReport, UploadReport
from modelpress.settings import read_settings
from modelpress.store.artifacts import load_artifact
from modelpress.store.base import open_store
from modelpress.store.local import local_errors
from tasks.records import Finished
from tasks.runner import RunContext, fetch_checkpoint, open_workload, run_stage

if TYPE_CHECKING:
    from modelpress.container import Coded
    from modelpress.shard import ShardFile

INDEX = "index.json"
"""Output of the shard stage beside the shards: the tensors of each."""


class Numbers(Report, extra="allow"):
    """A stage's numbers without times, as the manifest holds them."""


class Provenance(Report):
    """How a pack came to be: what the manifest tells beside the bytes."""

    lineage: dict[str, str]
    """sha256 of each stage's output."""
    reports: dict[str, dict[str, Any]]
    """Numbers of each stage, without times; of compress, how each tensor's codec was chosen."""
    scores: ArtifactRef
    """Per-sample scores of the served graph."""
    source_scores: ArtifactRef
    """Per-sample scores of the source model."""
    source_bytes: int
    """The source model's checkpoint."""


@task(name="compress", task_run_name="compress", cache_policy=NO_CACHE)
def compress(context: RunContext, graph: ArtifactRef, config: CompressConfig | None) -> Finished[CompressReport]:
    """Code each tensor without loss, and prove it by decoding."""

    def work(progress: Progress) -> tuple[Mapping[str, bytes], CompressReport]:
        from modelpress.compress import compress as run

        coded, report = run(fetch_checkpoint(graph), config, progress)
        return {"output": coded.to_bytes()}, report

    return run_stage(context, "compress", CompressReport, work, inputs=[graph], config=config)


@task(name="shard", task_run_name="shard", cache_policy=NO_CACHE)
def shard(context: RunContext, coded: ArtifactRef, config: ShardConfig) -> Finished[ShardReport]:
    """Cut the coded tensors into shards; `index` tells which tensors each holds."""

    def work(progress: Progress) -> tuple[Mapping[str, bytes], ShardReport]:
        from modelpress.container import Coded
        from modelpress.shard import write_shards

        with tempfile.TemporaryDirectory(prefix="modelpress-") as folder:
            tensors = Coded.from_bytes(load_artifact(coded))
            with local_errors(f"writing shards into {folder}", writing=True):
                shards, report = write_shards(tensors, config, Path(folder), progress)
            outputs = {shard.path.name: shard.path.read_bytes() for shard in shards}
        index = {shard.path.name: list(shard.tensors) for shard in shards}
        return {**outputs, INDEX: json.dumps(index).encode()}, report

    return run_stage(context, "shard", ShardReport, work, inputs=[coded], config=config)


@task(name="upload", task_run_name="upload", cache_policy=NO_CACHE)
def upload(
    context: RunContext,
    coded: ArtifactRef,
    shards: Mapping[str, ArtifactRef],
    config: OptimizeConfig,
    provenance: Provenance,
) -> Finished[UploadReport]:
    """Publish shards and files, and the manifest last."""
    settings = read_settings()
    store = open_store(settings.store_uri, settings)

    def work(progress: Progress) -> tuple[Mapping[str, bytes], UploadReport]:
        from modelpress.publish import publish
        from modelpress.shard import draft_manifest

        with tempfile.TemporaryDirectory(prefix="modelpress-") as folder:
            files = _shard_files(shards, Path(folder))
            manifest, blobs = draft_manifest(
                config.name,
                _with_files(context, coded, provenance),
                files,
                config=config.model_dump(mode="json"),
                lineage=provenance.lineage,
                licence=open_workload(context.workload, context.mlflow_run).licence(),
                reports={stage: Numbers.model_validate(found) for stage, found in provenance.reports.items()},
            )
            source_bytes = provenance.source_bytes
            report = publish(
                store, manifest, files, blobs, config=config.upload, source_bytes=source_bytes, progress=progress
            )
        return {}, report

    def published(report: UploadReport) -> bool:
        if store.signer is not None and not store.info(keys.signature(config.name, report.pack, store.signer.key_id)):
            return False  # published before there was this key: publishing again signs, and sends nothing
        return store.info(keys.manifest(config.name, report.pack)) is not None

    refs = [coded, *shards.values(), provenance.scores, provenance.source_scores]
    extra = {
        "store": store.uri,
        "reports": provenance.reports,
        "lineage": provenance.lineage,
        "licence": open_workload(context.workload, context.mlflow_run).licence(),
    }
    return run_stage(context, "upload", UploadReport, work, inputs=refs, config=config, extra=extra, valid=published)


def _shard_files(shards: Mapping[str, ArtifactRef], folder: Path) -> list[ShardFile]:
    """The shards on the local disk, in reading order."""
    from modelpress.shard import ShardFile

    index: dict[str, list[str]] = json.loads(load_artifact(shards[INDEX]))
    files = []
    for name, tensors in index.items():
        path = folder / name
        data = load_artifact(shards[name])
        with local_errors(f"writing {path}", writing=True):
            path.write_bytes(data)
        files.append(ShardFile(path, shards[name].sha256, shards[name].size_bytes, tuple(tensors)))
    return files


def _with_files(context: RunContext, coded: ArtifactRef, provenance: Provenance) -> Coded:
    """The coded tensors with the files that travel in the pack: the graph, the workload's own, the scores."""
    from modelpress.container import Coded
    from registry import scores

    found = Coded.from_bytes(load_artifact(coded))
    vectors = {
        name: scores.load(load_artifact(ref))["scores"]
        for name, ref in (("candidate", provenance.scores), ("source", provenance.source_scores))
    }
    files = {
        **found.files,
        **open_workload(context.workload, context.mlflow_run).files(),
        scores.SCORES_FILE: scores.dump_scored(vectors),
    }
    return replace(found, files=files)
