"""What slices say is put together only if it answers this process's own batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from modelpress import sliced
from modelpress.checkpoint import from_module
from modelpress.config import EvaluateConfig
from modelpress.errors import CorruptionError, WorkloadError
from modelpress.evaluate import Answered, evaluate, running
from modelpress.reduce import Answers, Piece
from modelpress.store.artifacts import save_artifact
from modelpress.store.base import open_store
from tests.toys import ImageToy

QUICK = EvaluateConfig(batch_sizes=[1], latency_seconds=0.01)


@pytest.fixture(scope="module")
def toy() -> ImageToy:
    return ImageToy(samples=150)


def answers(toy: ImageToy, numbers: list[int], folder: Path) -> Answers:
    with running(from_module(toy.module), toy, "CPUExecutionProvider", 1) as run:
        found = sliced.answer_batches(run, toy, numbers)
    data = safetensors.numpy.save({str(number): one.outputs for number, one in found.items()})
    file = save_artifact(open_store(str(folder)), data)
    return Answers(
        pieces={
            number: Piece(samples=one.samples, inputs_sha256=one.inputs_sha256, file=file)
            for number, one in found.items()
        },
        peak_memory_bytes=10 * len(numbers),
    )


def test_an_evaluation_from_slices_is_the_one_process_evaluation(toy: ImageToy, tmp_path: Path) -> None:
    whole = answers(toy, [2, 0], tmp_path).merge(answers(toy, [1], tmp_path))
    given = sliced.put_together(whole, sliced.marks(toy))
    assert given.peak_memory_bytes == 20
    checkpoint = from_module(toy.module)
    report, scored = evaluate(checkpoint, toy, QUICK, "source", None, 1, answers=given)
    expected, scores = evaluate(checkpoint, toy, QUICK, "source", None, 1)
    assert report.quality == expected.quality
    assert scored.scores is not None
    assert scores.scores is not None
    assert scored.scores.tobytes() == scores.scores.tobytes()
    assert scored.samples == scores.samples


def test_the_answers_are_what_is_judged(toy: ImageToy) -> None:
    """And not run once more beside."""
    always = np.zeros((150, 10), np.float32)
    always[:, 0] = 1
    report, _ = evaluate(from_module(toy.module), toy, QUICK, "source", None, 1, answers=Answered(always, 10**15))
    assert report.quality.value == 1.0
    assert report.peak_memory_bytes == 10**15


def test_answers_to_other_batches_are_refused(toy: ImageToy, tmp_path: Path) -> None:
    found, marks = answers(toy, [0, 1, 2], tmp_path), sliced.marks(toy)
    with pytest.raises(WorkloadError, match="batch 1"):
        sliced.put_together(answers(toy, [0, 2], tmp_path), marks)
    other = found.pieces[1].model_copy(update={"inputs_sha256": "0" * 64})
    with pytest.raises(WorkloadError, match="batch 1"):
        sliced.put_together(Answers(pieces={**found.pieces, 1: other}), marks)
    lost = found.pieces[1].model_copy(update={"file": answers(toy, [0], tmp_path).pieces[0].file})
    with pytest.raises(CorruptionError, match="no answers to batch 1"):
        sliced.put_together(Answers(pieces={**found.pieces, 1: lost}), marks)
    junk = found.pieces[1].model_copy(update={"file": save_artifact(open_store(str(tmp_path)), b"junk")})
    with pytest.raises(CorruptionError, match="safetensors"):
        sliced.put_together(Answers(pieces={**found.pieces, 1: junk}), marks)


def test_a_batch_that_there_is_not_is_an_error(toy: ImageToy, tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="no batch 3"):
        answers(toy, [0, 3], tmp_path)
    with pytest.raises(WorkloadError, match="empty"):
        sliced.marks(ImageToy(samples=0))


def test_a_batch_cannot_be_answered_twice(toy: ImageToy, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two slices"):
        answers(toy, [0, 1], tmp_path).merge(answers(toy, [1, 2], tmp_path))
