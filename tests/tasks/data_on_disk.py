"""A workload whose data lie in a file: three splits of numbers, one sample a line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from modelpress.progress import Progress, silent
from modelpress.workload import Batch, Split, Workload


class OnDisk(Workload):
    """Reads `path` once, when it is made."""

    metric = "accuracy"

    def __init__(self, path: str) -> None:
        self.lines = Path(path).read_text().splitlines()

    def source(self, progress: Progress = silent) -> nn.Module:
        torch.manual_seed(0)
        return self.skeleton({}).eval()

    def skeleton(self, architecture: Mapping[str, Any]) -> nn.Module:
        return nn.Linear(2, 2)

    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        index = ("train", "calibration", "evaluation").index(split)
        rows = torch.tensor([[float(number) for number in line.split()] for line in self.lines[index::3]])
        for part in rows.split(batch_size):
            yield Batch({"input": part}, torch.zeros(len(part), dtype=torch.long))

    def score(self, outputs: np.ndarray) -> np.ndarray:
        return np.ones(len(outputs))

    def identity(self) -> str:
        return hashlib.sha256("\n".join(sorted(self.lines)).encode()).hexdigest()
