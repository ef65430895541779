"""What plans are measured on."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import ModelProto

from modelpress import graph
from modelpress.agreement import Inputs
from modelpress.checkpoint import Checkpoint
from modelpress.errors import WorkloadError
from modelpress.quantize.rewrite import name_nodes_
from modelpress.workload import Workload

BATCH = 8
LEAST_SAMPLES = 8
"""Of calibration: fewer say nothing about a model."""


def named(checkpoint: Checkpoint) -> ModelProto:
    """The graph, each of its nodes with a name of its own."""
    model = graph.join(checkpoint)
    name_nodes_(model)
    return model


def calibration(workload: Workload) -> list[Inputs]:
    """The calibration split in batches of `BATCH`.

    Raises:
        WorkloadError: it has fewer than `LEAST_SAMPLES`.
    """
    batches: list[Inputs] = [batch.inputs for batch in workload.batches("calibration", BATCH)]
    if samples(batches) < LEAST_SAMPLES:
        raise WorkloadError(
            "planning on calibration data",
            found=f"{samples(batches)} samples",
            expected=f"at least {LEAST_SAMPLES}",
            fix="raise workload.calibration_samples",
        )
    return batches


def samples(batches: Sequence[Inputs]) -> int:
    """How many the batches hold."""
    return sum(len(next(iter(batch.values()))) for batch in batches)


def some(batches: Sequence[Inputs], wanted: int) -> list[Inputs]:
    """So many samples or a few more, in whole batches from the whole split, as a split may be in some order."""
    count = min(-(-wanted // BATCH), len(batches))
    return [batches[len(batches) * part // count] for part in range(count)]
