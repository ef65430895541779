"""What a plan is worth on data that it was not made on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modelpress import graph
from modelpress.agreement import divergence
from modelpress.checkpoint import Checkpoint
from modelpress.errors import WorkloadError
from modelpress.evaluate import quality
from modelpress.reports import QualityReport
from modelpress.workload import Workload

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Verdict:
    """Of the evaluation split."""

    disagreement: float
    """`divergence` from the float graph."""
    quality: QualityReport
    """The workload's metric, paired with the float graph's."""


def compare(reference: Checkpoint, made: Checkpoint, workload: Workload) -> Verdict:
    """Run both over the evaluation split, no more than a batch's outputs held whole.

    Raises:
        WorkloadError: the split is empty.
    """
    calm = graph.Tuning(spinning=False)  # they take turns: one's idle threads would keep the other's cores busy
    sessions = graph.session(reference, tuning=calm), graph.session(made, tuning=calm)
    kept: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    total, samples = 0.0, 0
    for batch in workload.batches("evaluation", workload.evaluation_batch_size):
        expected, found = (graph.run(session, batch.inputs) for session in sessions)
        total += divergence(found, expected, workload.outputs) * len(batch)
        samples += len(batch)
        for outputs, one in zip(kept, (expected, found), strict=True):
            outputs.append(workload.condense(one, batch))
    if not samples:
        raise WorkloadError("judging a plan", found="an empty evaluation split", expected="at least one sample")
    baseline, scores = (np.asarray(workload.score(np.concatenate(one)), np.float64) for one in kept)
    judged = quality(workload.metric, scores, baseline, CONFIDENCE)
    return Verdict(total / samples, judged.model_copy(update={"shown": workload.shown(judged.value)}))
