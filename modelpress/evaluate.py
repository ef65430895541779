"""What a model is worth after a stage: quality with its interval, bytes, latency, throughput, memory.

Torch checkpoints run as torch modules, ONNX ones in ONNX Runtime on the provider that the config names. The quality is
paired with the source model's on the same samples.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from modelpress import graph, intervals
from modelpress.checkpoint import Checkpoint, to_module
from modelpress.config import EvaluateConfig
from modelpress.cores import usable_cores
from modelpress.errors import BudgetExceededError, WorkloadError
from modelpress.progress import Progress, silent
from modelpress.reports import EvaluationReport, LatencyReport, QualityReport, Stage
from modelpress.scores import Mask, Scored
from modelpress.workload import Workload, samples_digest

Runner = Callable[[Mapping[str, Tensor]], np.ndarray]
"""Named inputs in, the model's output out: (samples, …), on the CPU."""


@dataclass(frozen=True)
class Answered:
    """What a model said of the whole evaluation split, however many processes it was asked in."""

    outputs: np.ndarray
    """Of each batch what `Workload.condense` made of it, in order: (samples, …)."""
    peak_memory_bytes: int | None
    """The most that one process took; None where it was not seen."""


_WARM_UP_CALLS = 3
_WARM_UP_SECONDS = 0.2
_LEAST_CALLS = 5
_MEMORY_INTERVAL_SECONDS = 0.02


def evaluate(
    checkpoint: Checkpoint,
    workload: Workload,
    config: EvaluateConfig,
    stage: Stage,
    baseline: Scored | None,
    size_bytes: int,
    progress: Progress = silent,
    original: Checkpoint | None = None,
    answers: Answered | None = None,
) -> tuple[EvaluationReport, Scored]:
    """Measure a checkpoint on the evaluation split.

    Args:
        checkpoint: torch or ONNX.
        workload: data and metric.
        config: what is measured and how.
        stage: whose output this is.
        baseline: the source model's scores from an earlier call, or None for the source itself.
        size_bytes: bytes of the artifact on disk.
        progress: told of each batch and each measured batch size.
        original: the source model in the same runtime; where `attribution_samples` asks for it, the reasons for the
            answers are compared with its own.
        answers: the model's answers on the whole split, where other processes made them; None: it is run here.

    Returns:
        The report, and the per-sample scores.

    Raises:
        SetupError: the asked execution provider is not in use.
        WorkloadError: a metric's scores are no finite vector, or not as many as the baseline's, a slice does not say
            of each sample whether it is in it, or the samples are not the baseline's.
    """
    total = 1 + len(config.batch_sizes)
    with PeakMemory() as memory, running(checkpoint, workload, config.provider, config.threads) as run:
        outputs = (
            _outputs(run, workload, lambda samples: progress(0, total, f"{workload.metric}: {samples} samples"))
            if answers is None
            else answers.outputs
        )
        scores = _finite(workload.metric, workload.score(outputs))
        further = {name: _finite(name, found) for name, found in workload.further_scores(outputs).items()}
        slices = _slices(workload, scores.size)
        latency = []
        for done, batch_size in enumerate(config.batch_sizes, start=1):
            progress(done, total, f"latency at batch {batch_size}")
            latency.append(measure_latency(run, workload.example(batch_size), batch_size, config.latency_seconds))
    scored = Scored(scores, samples_digest(workload), workload.metric, further, slices)
    _check_same_samples(scored, baseline)
    judged = quality(workload.metric, scores, baseline.scores if baseline else None, config.confidence)
    before = baseline.further if baseline else {}
    peaks = (memory.peak_bytes, answers.peak_memory_bytes if answers else None)
    report = EvaluationReport(
        stage=stage,
        runtime="torch" if checkpoint.kind == "torch" else "onnxruntime",
        provider=config.provider if checkpoint.kind == "onnx" else None,
        quality=judged.model_copy(update={"shown": workload.shown(judged.value)}),
        further=[quality(name, found, before.get(name), config.confidence) for name, found in further.items()],
        size_bytes=size_bytes,
        latency=latency,
        peak_memory_bytes=max((one for one in peaks if one is not None), default=None),
    )
    if original is not None and config.attribution_samples:
        from modelpress import attribution  # captum takes a second to import

        progress(total, total, "comparing attributions")
        report = report.model_copy(update={"attribution": attribution.compare(original, checkpoint, workload, config)})
    progress(total, total, f"{workload.metric} {report.quality.value:.4f}")
    return report, scored


def compare_modules(
    module: nn.Module, original: nn.Module, workload: Workload, confidence: float, progress: Progress = silent
) -> QualityReport:
    """The workload's metric of a torch module on the evaluation split, paired with that of the one it was made from.

    Raises:
        WorkloadError: see `evaluate`.
    """

    def scores(one: nn.Module, done: int) -> np.ndarray:
        with torch.inference_mode():
            outputs = _outputs(
                lambda inputs: np.asarray(one(**inputs).numpy()),
                workload,
                lambda samples: progress(done, 2, f"{workload.metric}: {samples} samples"),
            )
        return _finite(workload.metric, workload.score(outputs))

    baseline = scores(original.eval(), 0)
    judged = quality(workload.metric, scores(module.eval(), 1), baseline, confidence)
    return judged.model_copy(update={"shown": workload.shown(judged.value)})


def check_budget(report: EvaluationReport, config: EvaluateConfig) -> None:
    """Stop a run whose quality drop exceeds the budget by its whole confidence interval.

    Raises:
        BudgetExceededError: it does; the numbers are in it.
    """
    found = report.quality
    if found.difference is None or found.difference_low is None or found.difference_high is None:
        return
    if found.difference_high < -config.max_quality_drop:
        raise BudgetExceededError(
            f"judging {found.metric} after {report.stage}",
            found=f"{found.value:.4f} against the source model's {found.baseline:.4f}: "
            f"a drop of {-found.difference:.4f}, "
            f"{found.confidence:.0%} interval {-found.difference_high:.4f} to {-found.difference_low:.4f}, "
            f"on {found.samples} samples",
            expected=f"a drop of at most evaluate.max_quality_drop, {config.max_quality_drop:.4f}",
            fix=f"ask less of the {report.stage} stage, train longer, or widen the budget",
        )


def quality(metric: str, scores: np.ndarray, baseline_scores: np.ndarray | None, confidence: float) -> QualityReport:
    """Interval of the mean score, and of its paired difference to the baseline where there is one.

    Raises:
        WorkloadError: not as many scores as the baseline has.
    """
    value = intervals.mean(scores, confidence)
    report = QualityReport(
        metric=metric, samples=scores.size, value=value.value, low=value.low, high=value.high, confidence=confidence
    )
    if baseline_scores is None:
        return report
    if baseline_scores.shape != scores.shape:
        raise WorkloadError(
            f"pairing {metric} with the source model's",
            found=f"{scores.size} scores",
            expected=f"{baseline_scores.size}, one per sample of the evaluation split",
            fix="the evaluation split must be the same in the whole run",
        )
    difference = intervals.paired_difference(scores, baseline_scores, confidence)
    return report.model_copy(
        update={
            "baseline": float(baseline_scores.mean()),
            "difference": difference.value,
            "difference_low": difference.low,
            "difference_high": difference.high,
        }
    )


def measure_latency(run: Runner, inputs: Mapping[str, Tensor], batch_size: int, seconds: float) -> LatencyReport:
    """Time calls for about `seconds`, after a warm-up."""
    start = time.perf_counter()
    warm_ups = 0
    while warm_ups < _WARM_UP_CALLS or time.perf_counter() - start < min(_WARM_UP_SECONDS, seconds):
        run(inputs)
        warm_ups += 1
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < _LEAST_CALLS or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        run(inputs)
        times.append(time.perf_counter() - before)
    p50, p99 = np.quantile(times, [0.5, 0.99])
    return LatencyReport(
        batch_size=batch_size,
        calls=len(times),
        p50_seconds=float(p50),
        p99_seconds=float(p99),
        throughput_per_second=batch_size * len(times) / sum(times),
    )


@contextlib.contextmanager
def running(checkpoint: Checkpoint, workload: Workload, provider: str, threads: int) -> Iterator[Runner]:
    """Run a checkpoint: a torch one on the CPU, a graph on an execution provider; 0 threads take all cores."""
    threads = threads or usable_cores()
    if checkpoint.kind == "onnx":
        session = graph.session(checkpoint, provider, threads)
        yield lambda inputs: graph.run(session, inputs)
        return
    module = to_module(checkpoint, workload)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            yield lambda inputs: module(**inputs).numpy()
    finally:
        torch.set_num_threads(before)


def _outputs(run: Runner, workload: Workload, note: Callable[[int], None]) -> np.ndarray:
    """What `Workload.score` needs of the evaluation split; no more than one batch's outputs are held whole."""
    outputs: list[np.ndarray] = []
    samples = 0
    for batch in workload.batches("evaluation", workload.evaluation_batch_size):
        outputs.append(workload.condense(run(batch.inputs), batch))
        samples += len(batch)
        note(samples)
    if not outputs:
        raise WorkloadError("evaluating the model", found="an empty evaluation split", expected="at least one sample")
    return np.concatenate(outputs)


def _finite(metric: str, found: np.ndarray) -> np.ndarray:
    scores = np.asarray(found, dtype=np.float64)
    if scores.ndim != 1 or scores.size == 0 or not np.isfinite(scores).all():
        raise WorkloadError(
            f"scoring the model with {metric}",
            found=f"shape {list(scores.shape)}, {np.count_nonzero(~np.isfinite(scores))} not finite",
            expected="a vector of finite scores, one per sample",
            fix="return one float per evaluation sample from Workload.score",
        )
    return scores


def _slices(workload: Workload, samples: int) -> dict[str, Mask]:
    """The workload's groups of samples, checked."""
    found = {name: np.asarray(mask) for name, mask in workload.slices().items()}
    for name, mask in found.items():
        if mask.dtype != np.bool_ or mask.shape != (samples,) or not name:
            raise WorkloadError(
                f"reading slice {name!r} of the evaluation split",
                found=f"{mask.dtype}, shape {list(mask.shape)}",
                expected=f"bool, shape [{samples}]: of each sample, whether it is in the slice",
                fix="return one bool per evaluation sample from Workload.slices, in the order of `batches`",
            )
    return found


def _check_same_samples(scored: Scored, baseline: Scored | None) -> None:
    """Refuse to pair scores of other samples, however many they are."""
    if baseline is None or (baseline.scores is not None and scored.samples == baseline.samples):
        return
    raise WorkloadError(
        f"pairing {scored.metric} with the source model's",
        found="scores of other samples" if baseline.scores is not None else "no scores",
        expected="the source model's on the same samples in the same order",
        fix="the evaluation split must be the same in the whole run",
    )


class PeakMemory:
    """Samples resident memory on a thread. Memory that the process had freed and uses again does not show."""

    peak_bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        self._process = psutil.Process()
        self._before = self._highest = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="modelpress-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        above = self._highest - self._before
        self.peak_bytes = above if above > 0 else None

    def _sample(self) -> None:
        while not self._stop.wait(_MEMORY_INTERVAL_SECONDS):
            self._highest = max(self._highest, self._process.memory_info().rss)
