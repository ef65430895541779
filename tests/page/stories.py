"""Stories for pages: real packs in a store, with a run as the line reports it, perhaps full of hostile words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from modelpress import decisions, pointer
from modelpress.checkpoint import Checkpoint
from modelpress.compress import compress
from modelpress.config import ShardConfig
from modelpress.page import Story, read_story
from modelpress.publish import publish
from modelpress.reports import (
    AttributionExample,
    AttributionReport,
    Check,
    Decision,
    EvaluationReport,
    LatencyReport,
    Override,
    PlannedTensor,
    PlanPoint,
    PlanReport,
    PruneReport,
    QualityReport,
    QuantizeReport,
    RunReport,
    RunStage,
    SensitivityRow,
    SourceReport,
    Stage,
    TensorChange,
)
from modelpress.scores import SCORES_FILE, Scored, dump
from modelpress.shard import draft_manifest, write_shards
from modelpress.store import Store
from tests.packs import COMPRESS, torch_checkpoint
from tests.page.beside import advice, checks, profile, training

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=2>\"'$\\frac{&\u202e{{7*7}}"
NAME = "digits"


def quality(value: float, baseline: float | None = 0.98) -> QualityReport:
    difference = None if baseline is None else value - baseline
    return QualityReport(
        metric="accuracy",
        samples=400,
        value=value,
        low=value - 0.01,
        high=min(1.0, value + 0.01),
        baseline=baseline,
        difference=difference,
        difference_low=None if difference is None else difference - 0.005,
        difference_high=None if difference is None else difference + 0.005,
    )


def attribution(agreement: float) -> AttributionReport:
    grid = [float(place % 7 - 2) for place in range(64)]
    examples = [
        AttributionExample(
            sample=3, agreement=0.7, places=list(range(64)), before=grid, after=grid[::-1], rows=8, columns=8
        ),
        AttributionExample(sample=9, agreement=0.9, places=[0, 4, 5], before=[1.0, -2.0, 0.5], after=[0.9, -1.0, 0.4]),
    ]
    return AttributionReport(
        method="occlusion",
        samples=40,
        agreement=agreement,
        low=agreement - 0.1,
        high=agreement + 0.05,
        examples=examples,
    )


def evaluation(stage: Stage, value: float, speed: float, size: int, reasons: float | None = None) -> EvaluationReport:
    return EvaluationReport(
        stage=stage,
        runtime="torch" if stage in ("source", "distill", "prune") else "onnxruntime",
        provider=None if stage in ("source", "distill", "prune") else "CPUExecutionProvider",
        hardware="c7i",
        quality=quality(value, None if stage == "source" else 0.98),
        further=[quality(value - 0.1).model_copy(update={"metric": "top-3"})],
        size_bytes=size,
        latency=[
            LatencyReport(
                batch_size=batch,
                calls=100,
                p50_seconds=0.001 * batch / speed,
                p99_seconds=0.002 * batch / speed,
                throughput_per_second=1000 * speed,
            )
            for batch in (1, 32)
        ],
        peak_memory_bytes=None if stage == "source" else 5_000_000,
        attribution=attribution(reasons) if reasons is not None else None,
    )


def plan() -> PlanReport:
    def point(label: str, size: int, disagreement: float) -> PlanPoint:
        return PlanPoint(label=label, coded_bytes=size, disagreement=disagreement, predicted_disagreement=None)

    tensors = [
        PlannedTensor(
            name=f"conv{number}.weight",
            nodes=[f"/conv{number}/Conv"],
            shape=[16, 8, 3, 3],
            form="4 bits, a scale per channel",
            num_bits=4,
            scale="channel",
            sparsity=0.0,
            coded_bytes=1000,
            inline_bytes=0,
            disagreement=10.0**-number,
            is_measured=number % 2 == 0,
            measurements=3,
            law_holds=True,
        )
        for number in range(2, 6)
    ]
    return PlanReport(
        objective="bytes",
        divergence="kl",
        max_disagreement=0.01,
        eligible_weights=100,
        planned_weights=90,
        coverage=0.9,
        calibration_samples=64,
        predicted_disagreement=0.007,
        disagreement=0.008,
        predicted_bytes=9000,
        coded_bytes=9100,
        file_bytes=2000,
        float_bytes=40_000,
        measurements=12,
        tensors=tensors,
        front=[point("λ 1", 9100, 0.008), point("λ 2", 12_000, 0.003), point("λ 3", 20_000, 0.0004)],
        uniform=[point(f"{bits} bits, scale per channel", 2500 * bits, 0.2 / 4**bits) for bits in (8, 6, 5, 4)],
        held_out_disagreement=0.0085,
        quality=quality(0.97),
    )


def run_report(pack: str | None, *, word: str = "", stopped: str | None = None) -> RunReport:
    """A run of the whole line; `word` stands in every text that is not of a fixed set."""
    pruned = PruneReport(
        method=f"magnitude{word}",
        eligible_parameters=1000,
        touched_parameters=900,
        parameters_before=1000,
        parameters_after=500,
        zeros_after=0,
        tensors=[TensorChange(name=f"conv2.weight{word}", before=[32, 8], after=[16, 8], output_error=0.02)],
        recovery=training(word),
    )
    sensitivity = [
        SensitivityRow(node=f"/layer.{number}/MatMul{word}", disagreement=0.3 / (number + 1), kept_float=number == 0)
        for number in range(30)
    ]
    quantized = QuantizeReport(
        method="static",
        eligible_weights=100,
        quantized_weights=90,
        coverage=0.9,
        agreement=0.99,
        sensitivity=sensitivity,
    )
    source = SourceReport(parameters=1000, size_bytes=120_000, trained=True, origin=word or None)
    rounded = quantized.model_dump(mode="json")
    judged = [
        ("source", "source", 0.98, 1.0, 120_000, source.model_dump(mode="json")),
        ("source (onnx)", "export", 0.98, 2.0, 121_000, {}),
        ("prune", "prune", 0.975, 1.5, 60_000, pruned.model_dump(mode="json")),
        ("export", "export", 0.975, 3.0, 61_000, {}),
        ("quantize" + word, "quantize", 0.972, 4.0, 20_000, {} if word else rounded),
    ]
    stages = [
        RunStage(
            stage=label,
            seconds=1.5,
            reused=label == "source",
            size_bytes=size,
            evaluation=evaluation(stage, value, speed, size, 0.8 if stage == "quantize" else None),  # type: ignore[arg-type]
            report=report,
        )
        for label, stage, value, speed, size, report in judged
    ]
    if word:
        stages.append(RunStage(stage="quantize", report=rounded))
    stages += [
        RunStage(stage="plan", report=plan().model_dump(mode="json")),
        RunStage(stage="compress", seconds=0.2, size_bytes=17_000),
    ]
    return RunReport(
        name=NAME + word,
        pack=pack,
        source_bytes=120_000,
        stages=stages,
        served="quantize" + word,
        compared="source (onnx)",
        stopped=stopped,
        config={"name": NAME, "note": word},
        links={"MLflow run": "http://127.0.0.1:5000/#/runs/1", f"bad{word}": f"javascript:alert(1){word}"},
    )


def publish_story(store: Store, folder: Path, *, word: str = "", name: str = NAME, seed: int = 0) -> str:
    """Publish a small pack with scores, reports and a decision, let `champion` point at it, and return its digest."""
    made = torch_checkpoint(seed)
    vector = torch.linspace(0, 1, 50).numpy().astype("float64")
    groups = {f"class {number}{word.replace('/', '')}": np.arange(50) % 3 == number for number in range(3)}
    scored = Scored(vector * (1 - 0.01 * seed), "samples", "accuracy", slices=groups)
    files = made.files | {SCORES_FILE: dump({"candidate": scored, "source": scored})}
    if word:
        files |= {word.replace("/", "").replace("\\", ""): b"x"}
    tensors = {key + word: tensor for key, tensor in made.tensors.items()}
    coded, report = compress(Checkpoint("torch", tensors, files, made.metadata), COMPRESS)
    shards, _ = write_shards(coded, ShardConfig(max_shard_size=32_768), folder)
    reports = {
        "source": SourceReport(parameters=1, size_bytes=120_000, trained=False),
        "compress": report,
        "quality source": quality(0.98, None),
        "quality quantize": quality(0.972),
    }
    manifest, blobs = draft_manifest(
        name,
        coded,
        shards,
        config={"name": name, "note": word, "quantize": {"method": word or "static"}},
        lineage={"source": "a" * 64, f"stage {word}": word or "b" * 64},
        licence=word or "MIT",
        reports=reports,
    )
    pack = publish(store, manifest, shards, blobs, source_bytes=report.raw_bytes).pack
    decision = Decision(
        promote=True,
        verdict="inconclusive",
        reasons=["one"],
        required_samples=900,
        checks=[
            Check(name="quality against the source", verdict="pass", reason="0.97 against 0.98, margin 0.02"),
            Check(name=f"reasons{word}", verdict="inconclusive", reason=f"too few{word}", required_samples=900),
        ],
        override=Override(by=f"Anna{word}"[:100], reason=f"it is Friday{word}"),
    )
    decisions.keep(store, name, pack, "champion", decision, champion=None, after=0, gate={})
    pointer.append(store, name, "champion", pack, "promote")
    return pack


def told(store: Store, folder: Path, *, word: str = "") -> Story:
    """A story with everything in it."""
    pack = publish_story(store, folder, word=word)
    found = read_story(store, NAME, pack, run_report(pack, word=word))
    profiled = profile(word) if word else profile().model_copy(update={"subject": f"{NAME}@{pack[:12]}"})
    return replace(found, profile=profiled, advice=advice(word), checks=checks(word))
