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
from prefect.logging import get_run_logger

from modelpress import keys
from modelpress.config import CompressConfig, OptimizeConfig, ShardConfig, UploadConfig
from modelpress.progress import Progress
from modelpress.reports import ArtifactRef, CompressReport, Report, ShardReport, UploadReport
from modelpress.settings import Settings, read_settings
from modelpress.store.artifacts import load_artifact
from modelpress.store.base import Store, open_store
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
    graph: ArtifactRef
    """The served graph, which golden answers are asked of."""
    source_bytes: int
    """The source model's checkpoint."""


def pin_bases(config: OptimizeConfig) -> OptimizeConfig:
    """The config with the digests of the packs that it names as the base of this version: what an alias points at may
    change while the flow runs. Of a pack that is stored as differences it is that one's base.

    Raises:
        NotFoundError: there is no such pack or alias yet.
        ConfigError: what is named is neither an alias nor a digest.
    """
    compression, quantization = config.compress, config.quantize
    if (compression is None or compression.base is None) and (quantization is None or not quantization.scales_from):
        return config
    from modelpress.delta import find_base

    settings = read_settings()
    store = open_store(settings.store_uri, settings)
    changes: dict[str, Any] = {}
    if compression is not None and compression.base is not None:
        changes["compress"] = compression.model_copy(update={"base": find_base(store, config.name, compression.base)})
    if quantization is not None and quantization.scales_from is not None:
        base = find_base(store, config.name, quantization.scales_from)
        changes["quantize"] = quantization.model_copy(update={"scales_from": base})
    return config.model_copy(update=changes)


@task(name="compress", task_run_name="compress", cache_policy=NO_CACHE)
def compress(context: RunContext, graph: ArtifactRef, config: CompressConfig | None) -> Finished[CompressReport]:
    """Code each tensor without loss, and prove it by decoding; `config.base` is a digest here."""
    settings = read_settings()

    def work(progress: Progress) -> tuple[Mapping[str, bytes], CompressReport]:
        from modelpress import delta
        from modelpress.compress import compress as run

        checkpoint = fetch_checkpoint(graph)
        if config is None or config.base is None:
            coded, report = run(checkpoint, config, progress)
        else:
            base = delta.open_base(open_store(settings.store_uri, settings), context.name, config.base)
            coded, report = delta.compress_against(checkpoint, config, base, progress)
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
    """Publish shards and files, encrypted if the config says so, and the manifest last."""
    settings = read_settings()
    store = open_store(settings.store_uri, settings)
    secret = _secret(store, config.name, settings) if config.upload.encrypt else None

    def work(progress: Progress) -> tuple[Mapping[str, bytes], UploadReport]:
        from modelpress.cipher import seal_pack
        from modelpress.publish import publish
        from modelpress.shard import draft_manifest

        with tempfile.TemporaryDirectory(prefix="modelpress-") as folder:
            files = _shard_files(shards, Path(folder))
            manifest, blobs = draft_manifest(
                config.name,
                _with_files(context, coded, provenance, config.upload),
                files,
                config=config.model_dump(mode="json", exclude={"gpu", "workers"}),  # where it was made is no other pack
                lineage=provenance.lineage,
                licence=open_workload(context.workload, context.mlflow_run).licence(),
                reports={stage: Numbers.model_validate(found) for stage, found in provenance.reports.items()},
            )
            if secret is not None:
                manifest, files, blobs = seal_pack(manifest, files, blobs, secret, Path(folder), progress=progress)
            source_bytes = provenance.source_bytes
            report = publish(
                store, manifest, files, blobs, config=config.upload, source_bytes=source_bytes, progress=progress
            )
        return {}, report

    def published(report: UploadReport) -> bool:
        if store.signer is not None and not store.info(keys.signature(config.name, report.pack, store.signer.key_id)):
            return False  # published before there was this key: publishing again signs, and sends nothing
        return store.info(keys.manifest(config.name, report.pack)) is not None

    refs = [coded, *shards.values(), provenance.scores, provenance.source_scores, provenance.graph]
    extra = {
        "store": store.uri,
        "reports": provenance.reports,
        "lineage": provenance.lineage,
        "licence": open_workload(context.workload, context.mlflow_run).licence(),
        **({"secret": secret[0]} if secret else {}),  # its id: after a new one, the pack is published anew
    }
    return run_stage(context, "upload", UploadReport, work, inputs=refs, config=config, extra=extra, valid=published)


def _secret(store: Store, name: str, settings: Settings) -> tuple[str, bytes]:
    """Id and bytes of the model's secret; it stays in this process."""
    from modelpress.cipher import secrets, wrapping_keys

    return secrets.current(store, name, wrapping_keys(settings))


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


def _with_files(context: RunContext, coded: ArtifactRef, provenance: Provenance, config: UploadConfig) -> Coded:
    """The coded tensors with the files that travel in the pack: graph, the workload's own, scores, golden samples."""
    from modelpress import scores
    from modelpress.container import Coded

    golden = (
        _golden(context, provenance.graph, config) if config.golden_samples else {}
    )  # first: it holds the model, too
    found = Coded.from_bytes(load_artifact(coded))
    vectors = {
        name: scores.load(load_artifact(ref))["scores"]
        for name, ref in (("candidate", provenance.scores), ("source", provenance.source_scores))
    }
    files = {
        **found.files,
        **open_workload(context.workload, context.mlflow_run).files(),
        scores.SCORES_FILE: scores.dump(vectors),
        **golden,
    }
    return replace(found, files=files | _processing(context, files))


def _processing(context: RunContext, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The workload's description of what stands before and behind the graph, if it fits the graph and the files."""
    from modelpress import graph, process
    from modelpress.checkpoint import Checkpoint

    spec = open_workload(context.workload, context.mlflow_run).processing()
    if spec is None:
        return {}
    process.Pipeline(spec, files, *process.features_of(graph.parse(Checkpoint("onnx", {}, dict(files)))))
    return {process.PROCESSING_FILE: spec.to_bytes()}


def _golden(context: RunContext, graph: ArtifactRef, config: UploadConfig) -> dict[str, bytes]:
    """A few inputs and the graph's answers, as a file by name; nothing where a single input is too large for it."""
    from modelpress import golden, golden_inputs

    workload, samples = open_workload(context.workload, context.mlflow_run), config.golden_samples
    if config.golden_inputs == "synthetic":
        inputs = golden_inputs.of_workload(workload, samples)
    else:
        inputs = {name: tensor.numpy() for name, tensor in workload.example(samples).items()}
    made = golden.make(fetch_checkpoint(graph), inputs, classes=workload.outputs == "logits")
    if made is None:
        text = "upload: no golden samples, one input takes more than %d bytes; servers can't test the pack"
        get_run_logger().warning(text, golden.MAX_INPUT_BYTES, extra={"stage": "upload"})
        return {}
    return {golden.GOLDEN_FILE: made.to_bytes()}
