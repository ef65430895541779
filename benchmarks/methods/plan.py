"""Planned bits, scales and zeros against the best setting that is the same for all weights, on three kinds of models;
and planned kernels against one kernel for all products."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

from benchmarks._encoder import encoder_config
from benchmarks._report import Row, main
from benchmarks.methods.language_model import CONFIG as DECODER
from benchmarks.methods.language_model import QUICK as SMALL_DECODER
from benchmarks.methods.language_model import trained_decoder
from modelpress.checkpoint import Checkpoint
from modelpress.config import CompressConfig, ExportConfig, PlanConfig, WorkloadConfig
from modelpress.export import export
from modelpress.plan import Survey, held_out, plan, settle, survey
from modelpress.reports import PlanPoint
from modelpress.workload import Workload
from modelpress.workloads.causal_lm import CausalLM
from modelpress.workloads.image_classification import ImageClassification
from modelpress.workloads.sentence_embedding import SentenceEmbedding

NOTE = """\
`uniform` is the best setting that is the same for all weights: of all that are offered, the one of fewest bytes among
those that disagree with the float graph on calibration data no more than the best one of 5 bits. The plan is given nine
tenths of that as its budget, so that it holds on other data as well. `coded` is what the lossless codecs make of all
tensors; `held-out` is the disagreement on data that no choice was made on: mean KL divergence of the softmax in nats,
or 1 − mean cosine of embeddings. `metric` is the workload's own on the same data. Asked: at least 20 % fewer coded
bytes than uniform at no more held-out disagreement. `zeros` is what the same plan takes fewer bytes than one without
zeros of its own in the same budget, `filled` what it takes fewer than the last Lagrangian solution within it.

For time, a kernel's saving is measured once for all products of a shape, and `foretold` is what the chosen ones add up
to; `ms` is the fastest call of the whole graph, called in turns with the float one.
"""

ASKED = 20.0
SHARE = 0.9
"""Of what uniform disagrees, the plan's budget."""
WANTED_BITS = 5
"""Uniform is no worse than the best setting of so many bits: coarse enough to matter, and no ruin."""

CNN = WorkloadConfig(kind="image-classification", model="digits-cnn", data="digits", train_epochs=10)
ENCODER = encoder_config(calibration=40, evaluation=150)
DECODER_BLOCKS = 24
"""Of its calibration split: 3,048 answers."""
PLAN = PlanConfig(points=0)
LARGER = PlanConfig(points=0, num_bits=[8, 6, 5, 4, 3], sensitivity_samples=8)
"""For models whose calls take a while."""
FASTEST = PlanConfig(
    objective="seconds",
    max_disagreement=0.01,
    kernels=["int8", "nbits-8"],
    batch_size=8,
    latency_seconds=2.0,
    sensitivity_samples=8,
    points=0,
)


def measure(quick: bool) -> Iterator[Row]:
    """Rows of each kind of model."""
    image = ImageClassification(CNN.model_copy(update={"train_epochs": 3}) if quick else CNN)
    yield from _compared("digits CNN", image, export(image.source(), image, ExportConfig())[0], PLAN, zeros=True)
    module, language = trained_decoder(config=SMALL_DECODER if quick else DECODER)
    exported = export(module, language, ExportConfig())[0]
    yield from _compared("causal language model", _fewer(language, DECODER_BLOCKS), exported, LARGER)
    if not quick:
        text = SentenceEmbedding(ENCODER)
        exported = export(text.source(), text, ExportConfig())[0]
        yield from _compared("sentence encoder", text, exported, LARGER, zeros=True)
        yield from _timed("sentence encoder, time of a call of 8", text, exported, FASTEST)


def _compared(
    case: str, workload: Workload, source: Checkpoint, config: PlanConfig, *, zeros: bool = False
) -> Iterator[Row]:
    started = time.perf_counter()
    known = survey(source, workload, config, CompressConfig(), _Say(case))
    best = _best([point for point in known.uniform if point.label.startswith(f"{WANTED_BITS} bits")], known.uniform)
    budget = SHARE * best.disagreement
    made, report = settle(known, budget, _Say(case))
    seconds = time.perf_counter() - started
    setting = next(one for one in known.settings if str(one) == best.label)
    judged = held_out.compare(source, known.build(known.alike(setting)), workload)
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
    if zeros:
        dense = settle(_without_zeros(known), budget, _Say(case))[1]
        yield Row(case, "modelpress", "zeros", "%", 100 * (1 - report.coded_bytes / dense.coded_bytes))
    if report.unfilled_bytes is not None:
        yield Row(case, "modelpress", "filled", "%", 100 * (1 - report.coded_bytes / report.unfilled_bytes))
    yield Row(case, "modelpress", "foretold ÷ measured", "", report.predicted_disagreement / report.disagreement)
    yield Row(case, "modelpress", "measurements", "", report.measurements)
    yield Row(case, "modelpress", "time of a plan", "s", seconds)
    yield Row(case, "asked", "fewer bytes", "%", ASKED)


def _timed(case: str, workload: Workload, source: Checkpoint, config: PlanConfig) -> Iterator[Row]:
    started = time.perf_counter()
    _, report = plan(source, workload, config, CompressConfig(), _Say(case))
    seconds = time.perf_counter() - started
    yield Row(case, "float", "ms", "ms", _ms(report.float_seconds))
    for point in report.uniform:
        yield Row(case, f"uniform: {point.label}", "ms", "ms", _ms(point.seconds))
        yield Row(case, f"uniform: {point.label}", "calibration", "", point.disagreement)
    yield Row(case, "modelpress", "ms", "ms", _ms(report.seconds))
    yield Row(case, "modelpress", "calibration", "", report.disagreement)
    yield Row(case, "modelpress", "foretold", "ms", _ms(report.predicted_seconds))
    yield Row(case, "modelpress", "held-out", "", report.held_out_disagreement)
    yield Row(case, "modelpress", workload.metric, "", report.quality.value)
    yield Row(case, "modelpress", "time of a plan", "s", seconds)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def _best(of_bits: list[PlanPoint], every: list[PlanPoint]) -> PlanPoint:
    """Of all settings that agree no less than the best of these bits, the one of fewest bytes."""
    budget = min(of_bits, key=lambda point: point.disagreement).disagreement
    within = [point for point in every if point.disagreement <= budget]
    return min(within, key=lambda point: point.coded_bytes)


def _without_zeros(known: Survey) -> Survey:
    """The same survey without the candidates that have zeros of their own."""
    return replace(
        known,
        weights={
            name: replace(one, candidates=tuple(each for each in one.candidates if not each.sparsity))
            for name, one in known.weights.items()
        },
        curves={name: [one for one in curve if not one.candidate.sparsity] for name, curve in known.curves.items()},
    )


def _fewer(workload: CausalLM, blocks: int) -> CausalLM:
    """The workload with so many calibration blocks."""
    fewer = copy.copy(workload)
    fewer.blocks = {**workload.blocks, "calibration": workload.blocks["calibration"][:blocks]}
    return fewer


class _Say:
    """Progress for those who wait: a line each few seconds."""

    SECONDS = 10.0

    def __init__(self, case: str) -> None:
        self._case, self._said = case, time.monotonic()

    def __call__(self, done: int, total: int, note: str = "") -> None:
        if time.monotonic() - self._said >= self.SECONDS:
            print(f"{self._case}: {done} of {total}: {note}", file=sys.stderr, flush=True)
            self._said = time.monotonic()


if __name__ == "__main__":
    main("methods.plan", measure, note=NOTE)
