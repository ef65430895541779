"""A workload with nothing to do: what is measured with it is the overhead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from modelpress.progress import Progress, silent
from modelpress.workload import SPLITS, Batch, Split, Workload


class Tiny(Workload):
    """So many samples, each a batch of its own, for a linear layer."""

    metric = "accuracy"
    evaluation_batch_size = 1

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def source(self, progress: Progress = silent) -> nn.Module:  # noqa: ARG002
        """The layer."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.skeleton({}).eval()

    def skeleton(self, architecture: Mapping[str, Any]) -> nn.Module:  # noqa: ARG002
        """The layer, untrained."""
        return nn.Linear(4, 2)

    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:  # noqa: ARG002
        """Random numbers."""
        rows = torch.randn(self.samples, 4, generator=torch.Generator().manual_seed(SPLITS.index(split)))
        for part in torch.split(rows, batch_size):
            yield Batch({"input": part})

    def score(self, outputs: np.ndarray) -> np.ndarray:
        """Whether the class is 0."""
        return np.asarray(outputs.argmax(axis=1) == 0, np.float64)

    def identity(self) -> str:
        """Of its size."""
        return f"tiny {self.samples}"
