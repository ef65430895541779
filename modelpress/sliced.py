"""A model's answers on the evaluation split, batch by batch in any process, and put together again.

Slices are of whole batches, those that one process would run: so each answer is computed on the same inputs in the same
shapes. What is put together is checked to be answers to this process's own batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import safetensors
import safetensors.numpy

from modelpress.errors import CorruptionError, WorkloadError
from modelpress.evaluate import Answered, Runner
from modelpress.reduce import Answers
from modelpress.store.artifacts import load_artifact
from modelpress.workload import Batch, Workload


@dataclass(frozen=True)
class Mark:
    """By which a batch is known."""

    samples: int
    """In it."""
    inputs_sha256: str
    """Of names, dtypes, shapes and bytes."""
    elements: int
    """Of all inputs, padding included: what a batch takes goes about with them."""


@dataclass(frozen=True)
class BatchAnswer(Mark):
    """What a model said to a batch."""

    outputs: np.ndarray
    """As `Workload.condense` left them, (samples, …)."""


def marks(workload: Workload) -> list[Mark]:
    """The batches of the evaluation split that one process would run, in order.

    Raises:
        WorkloadError: there are none.
    """
    found = [_mark(batch) for batch in workload.batches("evaluation", workload.evaluation_batch_size)]
    if not found:
        raise WorkloadError("evaluating the model", found="an empty evaluation split", expected="at least one sample")
    return found


def answer_batches(run: Runner, workload: Workload, numbers: Sequence[int]) -> dict[int, BatchAnswer]:
    """A model's answers to some batches of the evaluation split, by their numbers.

    The data of batches that are left out is read all the same, up to the last one that is wanted.

    Raises:
        WorkloadError: the split has no such batch.
    """
    wanted, found = set(numbers), dict[int, BatchAnswer]()
    for number, batch in enumerate(workload.batches("evaluation", workload.evaluation_batch_size)):
        if number in wanted:
            mark = _mark(batch)
            outputs = workload.condense(run(batch.inputs), batch)
            found[number] = BatchAnswer(mark.samples, mark.inputs_sha256, mark.elements, outputs)
        if len(found) == len(wanted):
            return found
    raise WorkloadError(
        "evaluating a slice of the evaluation split",
        found=f"no batch {min(wanted - found.keys())}",
        expected="the batches that there were when the work was cut",
        fix="the data must not change while a run reads it",
    )


def put_together(answers: Answers, batches: Sequence[Mark]) -> Answered:
    """The answers of all slices as one process would have them.

    Raises:
        WorkloadError: a worker read another batch than this process has under its number.
        CorruptionError: a file does not hold what its slice said.
    """
    files = {piece.file.sha256: piece.file for piece in answers.pieces.values()}
    tensors = {sha256: _read(load_artifact(file)) for sha256, file in files.items()}
    outputs = []
    for number, mark in enumerate(batches):
        piece = answers.pieces.get(number)
        if piece is None or (piece.samples, piece.inputs_sha256) != (mark.samples, mark.inputs_sha256):
            raise WorkloadError(
                f"putting together the answers to batch {number}",
                found=f"{piece.samples} samples, sha256 {piece.inputs_sha256}" if piece else "none",
                expected=f"{mark.samples} samples, sha256 {mark.inputs_sha256}",
                fix="Workload.batches must give the same evaluation batches in every process",
            )
        found = tensors[piece.file.sha256].get(str(number))
        if found is None:
            raise CorruptionError(f"reading {piece.file.uri}", found=f"no answers to batch {number}", expected="some")
        outputs.append(found)
    return Answered(np.concatenate(outputs), answers.peak_memory_bytes)


def _mark(batch: Batch) -> Mark:
    digest = hashlib.sha256()
    for name, tensor in sorted(batch.inputs.items()):
        digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)};".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return Mark(len(batch), digest.hexdigest(), sum(tensor.numel() for tensor in batch.inputs.values()))


def _read(data: bytes) -> Mapping[str, np.ndarray]:
    try:
        found: dict[str, np.ndarray] = safetensors.numpy.load(data)
    except safetensors.SafetensorError as error:
        raise CorruptionError("reading a slice's answers", found=str(error), expected="a safetensors file") from error
    return found
