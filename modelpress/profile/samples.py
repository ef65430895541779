"""Inputs for a published graph whose data are not here: those of its golden samples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from modelpress import golden
from modelpress.checkpoint import Checkpoint
from modelpress.errors import WorkloadError


def golden_example(checkpoint: Checkpoint, what: str) -> Callable[[int], dict[str, Tensor]]:
    """What gives so many samples, as `Workload.example` does: the golden ones, again and again.

    Raises:
        WorkloadError: the pack has none.
        CorruptionError: its file of golden samples is none.
    """
    data = checkpoint.files.get(golden.GOLDEN_FILE)
    if data is None:
        raise WorkloadError(
            f"profiling {what}",
            found="no golden samples in the pack",
            expected="inputs to run it with",
            fix="give the recipe that it was made by, with its data: --recipe PATH",
        )
    inputs = {name: torch.from_numpy(array) for name, array in golden.read(data).inputs.items()}

    def example(batch_size: int) -> dict[str, Tensor]:
        return {name: tensor[torch.arange(batch_size) % len(tensor)] for name, tensor in inputs.items()}

    return example
