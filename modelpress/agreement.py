"""How far a graph's answers are from those of another, on fixed inputs.

No more is in memory than `MAX_HELD_BYTES` of the reference's outputs and those of one batch: a language model's logits
may be many times that, and the reference then runs anew for the batches beyond.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from modelpress import graph
from modelpress.checkpoint import Checkpoint
from modelpress.errors import StageError
from modelpress.workload import Outputs

Inputs = Mapping[str, Tensor]
Distance = Callable[[np.ndarray, np.ndarray], float]
"""Of outputs from those expected, (samples, …) both: a mean over the samples, 0 where they are the same."""

MAX_HELD_BYTES = 2**28
"""Of a reference's outputs."""
CHUNK_ELEMENTS = 2**22
"""Logits that are softmaxed at a time, in float64."""


class Reference:
    """A reference's outputs, batch by batch: the first ones held, the others made anew each time.

    Args:
        run: gives the outputs for the batch at an index, (samples, …).
        batches: how many there are.
    """

    def __init__(self, run: Callable[[int], np.ndarray], batches: int) -> None:
        self._run, self._batches = run, batches
        self._held: list[np.ndarray] = []
        size = 0
        for index in range(batches):
            outputs = run(index)
            size += outputs.nbytes
            if size > MAX_HELD_BYTES:
                break
            self._held.append(outputs)

    def __iter__(self) -> Iterator[np.ndarray]:
        yield from self._held
        for index in range(len(self._held), self._batches):
            yield self._run(index)

    def distance(self, run: Callable[[int], np.ndarray], distance: Distance) -> float:
        """Of another's outputs, each batch weighed by its samples."""
        total, samples = 0.0, 0
        for index, expected in enumerate(self):
            total, samples = total + distance(run(index), expected) * len(expected), samples + len(expected)
        return total / samples


class Judge:
    """Compares checkpoints with a reference.

    Args:
        reference: an ONNX checkpoint.
        batches: named inputs.
        distance: of outputs from the reference's.
    """

    def __init__(self, reference: Checkpoint, batches: Sequence[Inputs], distance: Distance) -> None:
        self._batches, self._distance = batches, distance
        self._reference = Reference(self._runner(reference), len(batches))

    def disagreement(self, checkpoint: Checkpoint) -> float:
        """Distance of a checkpoint's outputs from the reference's."""
        return self._reference.distance(self._runner(checkpoint), self._distance)

    def _runner(self, checkpoint: Checkpoint) -> Callable[[int], np.ndarray]:
        session = graph.session(checkpoint)
        return lambda index: graph.run(session, self._batches[index])


def from_cosine(found: np.ndarray, expected: np.ndarray) -> float:
    """1 − the mean cosine between the outputs of each sample."""
    return 1.0 - mean_cosine(_rows(found), _rows(expected))


def divergence(found: np.ndarray, expected: np.ndarray, outputs: Outputs) -> float:
    """How far outputs are from those expected, 0 where they are the same.

    Logits, (samples, …, classes): the mean over samples (and tokens) of KL(softmax(expected) ‖ softmax(found)), in
    nats. Embeddings, (samples, …): 1 − the mean cosine.

    Raises:
        StageError: outputs that are NaN or infinite.
    """
    wrong = int(np.count_nonzero(~np.isfinite(found)))
    if wrong:
        raise StageError(
            "comparing outputs with the float graph's",
            found=f"{wrong} of {found.size} NaN or infinite",
            expected="finite outputs",
            fix="look at the model on its calibration data, or keep wider plan.num_bits",
        )
    if outputs == "embeddings":
        return max(from_cosine(found, expected), 0.0)
    classes = expected.shape[-1]
    found, expected = found.reshape(-1, classes), expected.reshape(-1, classes)
    rows, total = max(1, CHUNK_ELEMENTS // classes), 0.0
    for start in range(0, len(expected), rows):
        log_p, log_q = (_log_softmax(one[start : start + rows]) for one in (expected, found))
        total += float(np.sum(np.exp(log_p) * (log_p - log_q)))
    return max(total / len(expected), 0.0)


def mean_cosine(found: np.ndarray, expected: np.ndarray) -> float:
    """Mean over the rows of the cosine between two (samples, features) matrices; two zero rows agree, a zero row and
    another do not."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)  # of one batch
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    products = np.sum(found * expected, axis=1)
    both_zero = ~found.any(axis=1) & ~expected.any(axis=1)
    cosines = np.where(norms > 0, products / np.where(norms > 0, norms, 1.0), both_zero)
    return float(np.clip(cosines, -1.0, 1.0).mean())


def _rows(output: np.ndarray) -> np.ndarray:
    return output.reshape(len(output), -1)


def _log_softmax(logits: np.ndarray) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    values: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return values
