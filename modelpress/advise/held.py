"""Calibration data in two parts: one that techniques are fitted on, and one that they are judged on.

Whatever is chosen here is chosen on calibration data; the evaluation split is not looked at, so that what it says of
the advised model later is still worth something.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from modelpress import graph, intervals
from modelpress.agreement import divergence
from modelpress.checkpoint import Checkpoint
from modelpress.errors import WorkloadError
from modelpress.reports import NotPredicted, Predicted, Prediction
from modelpress.workload import Batch, Split, Workload

BATCH = 8
FITTED_SHARE = 0.25
"""Of the calibration batches: ranges and moments settle on few samples, a difference in quality on many."""
ENOUGH_HELD = 1024
"""Samples to judge by, where training data were never trained on."""
LEAST_HELD = 16
CONFIDENCE = 0.95

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Parts:
    """A workload's calibration data, cut."""

    fitting: Workload
    """The workload with the first part as its whole calibration split."""
    held: list[Batch]
    """The rest, and training samples of a model that was not trained here."""

    @property
    def samples(self) -> int:
        """Held ones."""
        return sum(map(len, self.held))


@dataclass(frozen=True)
class Answers:
    """What a graph answers on the held samples."""

    outputs: list[np.ndarray]
    """By batch."""
    scores: Scores | None
    """Of each sample; None: nothing says what is right."""


def cut(workload: Workload) -> Parts:
    """The parts of a workload.

    Raises:
        WorkloadError: too few calibration samples.
    """
    batches = list(workload.batches("calibration", BATCH, 0))
    count = max(1, round(FITTED_SHARE * len(batches)))
    fitted, held = batches[:count], batches[count:]
    if not workload.trains_source:
        enough = ENOUGH_HELD - sum(map(len, held))
        for batch in workload.batches("train", BATCH, 0):
            if enough <= 0:
                break
            held.append(batch)
            enough -= len(batch)
    if sum(map(len, held)) < LEAST_HELD:
        raise WorkloadError(
            "cutting the calibration split for an advice",
            found=f"{sum(map(len, batches))} samples, of which {sum(map(len, held))} are left to judge by",
            expected=f"at least {LEAST_HELD} beside the {FITTED_SHARE:.0%} that techniques are fitted on",
            fix="raise workload.calibration_samples",
        )
    return Parts(_only(workload, fitted), held)


def _only(workload: Workload, fitted: list[Batch]) -> Workload:
    """A copy of a workload whose calibration split is these batches."""

    def batches(split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        if split != "calibration" or seed is not None:
            yield from workload.batches(split, batch_size, seed)
            return
        for batch in fitted:
            yield from batch.cut(-(-len(batch) // batch_size))

    made = copy.copy(workload)
    vars(made)["batches"] = batches  # a class of its own would not be the workload's kind any more
    return made


def answers(checkpoint: Checkpoint, parts: Parts) -> Answers:
    """What an ONNX checkpoint answers on the held samples."""
    session = graph.session(checkpoint)
    outputs = [graph.run(session, batch.inputs) for batch in parts.held]
    return Answers(outputs, _scores(outputs, parts))


def disagreement(found: Answers, expected: Answers, workload: Workload) -> float:
    """Mean divergence of the outputs on the held samples; see `agreement.divergence`."""
    total = samples = 0.0
    for one, other in zip(found.outputs, expected.outputs, strict=True):
        total += divergence(one, other, workload.outputs) * len(other)
        samples += len(other)
    return total / samples


def quality_drop(found: Answers, expected: Answers, parts: Parts) -> Prediction:
    """How much worse answers are than those expected, with the interval of the paired difference.

    Right answers are those of the calibration split's targets. Where it has none, and the outputs are logits, no more
    can be lost than answers have changed.
    """
    if found.scores is not None and expected.scores is not None:
        change = intervals.paired_difference(found.scores, expected.scores, CONFIDENCE)
        by = f"{found.scores.size} held calibration samples, paired"
        return Predicted(value=-change.value, low=-change.high, high=-change.low, by=by)
    if parts.fitting.outputs == "embeddings":
        return NotPredicted(not_predicted="the calibration split has no pairs or targets: nothing says what is right")
    pairs = zip(found.outputs, expected.outputs, strict=True)
    changed = [(one.argmax(-1) != other.argmax(-1)).ravel() for one, other in pairs]
    every = np.concatenate(changed)
    share = intervals.wilson(int(every.sum()), every.size, CONFIDENCE)
    by = f"{every.sum()} of {every.size} answers changed; without targets, all of them count as lost"
    return Predicted(value=share.value, low=-share.high, high=share.high, by=by)


def _scores(outputs: list[np.ndarray], parts: Parts) -> Scores | None:
    """Of each held sample, by its target: right or wrong; of a pair, 1 ÷ rank; of a language model, and of whatever
    else has a loss of its own, minus that of the sample."""
    targets = [batch.targets for batch in parts.held]
    if any(one is None for one in targets):
        return None
    first = outputs[0]
    kind = parts.fitting.outputs
    if kind == "embeddings":
        return _ranks(outputs, parts.held)
    if first.ndim == 2 and targets[0] is not None and targets[0].ndim == 1 and not targets[0].is_floating_point():
        pairs = zip(outputs, targets, strict=True)
        right = [one.argmax(axis=1) == target.numpy() for one, target in pairs if target is not None]
        return np.asarray(np.concatenate(right), dtype=np.float64)
    found = []
    for one, batch in zip(outputs, parts.held, strict=True):
        for row, sample in enumerate(batch.cut(len(batch))):
            found.append(-float(parts.fitting.loss(torch.from_numpy(one[row : row + 1]), sample)))
    return np.asarray(found, dtype=np.float64)


def _ranks(outputs: list[np.ndarray], held: list[Batch]) -> Scores | None:
    """Of each pair, 1 ÷ rank of its second text among all second texts."""
    firsts, seconds = [], []
    for one, batch in zip(outputs, held, strict=True):
        targets = batch.targets
        if targets is None or len(targets) % 2 or not torch.equal(*targets.chunk(2)):
            return None
        queries, documents = np.array_split(one, 2)
        firsts.append(queries)
        seconds.append(documents)
    queries, documents = np.concatenate(firsts), np.concatenate(seconds)
    similarity = queries @ documents.T
    right = np.diagonal(similarity)
    # Written as "not below" so that NaN counts against the model.
    return np.asarray(1.0 / (~(similarity < right[:, None])).sum(axis=1), dtype=np.float64)
