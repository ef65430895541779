"""A small workload by import path: a good one, and the ways in which a user's own goes wrong."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelpress.config import TrainConfig
from modelpress.progress import Progress, silent
from modelpress.workload import Batch, Split, Workload
from modelpress.workloads.sources import trained

WIDTH, CLASSES = 32, 16


class Net(nn.Module):
    """Two layers; `branching` asks the data which way to go, which no graph can hold."""

    def __init__(self, branching: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.branching = nn.Linear(WIDTH, 128), nn.Linear(128, CLASSES), branching

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.first(input)
        if self.branching and float(hidden.sum()) > 0:
            hidden = hidden * 2
        return self.second(torch.relu(hidden))


class Small(Workload):
    """Random numbers in three splits; with `overlap` the evaluation split holds a calibration sample, with `tuned` the
    weights are off by so much of their size, as after a light fine-tune."""

    metric = "accuracy"

    def __init__(self, overlap: bool = False, branching: bool = False, tuned: float = 0.0) -> None:
        x = torch.randn(600, WIDTH, generator=torch.Generator().manual_seed(0))
        self.rows = {"train": x[:100], "calibration": x[100:200], "evaluation": x[200:]}
        if overlap:
            self.rows["evaluation"] = x[199:]
        self.overlap, self.branching, self.tuned = overlap, branching, tuned

    def skeleton(self, architecture: Mapping[str, Any]) -> nn.Module:
        return Net(self.branching)

    def source(self, progress: Progress = silent) -> nn.Module:
        net = self.skeleton({}).eval()
        with torch.no_grad():
            for parameter in net.parameters():
                generator = torch.Generator().manual_seed(1)
                parameter += self.tuned * parameter.std() * torch.randn(parameter.shape, generator=generator)
        return net

    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        for part in self.rows[split].split(batch_size):
            yield Batch({"input": part}, torch.zeros(len(part), dtype=torch.long))

    def score(self, outputs: np.ndarray) -> np.ndarray:
        return (outputs.argmax(1) == 0).astype(np.float64)

    def identity(self) -> str:
        return f"small {self.overlap} {self.branching} {self.tuned}"


class Striking(Small):
    """`Small` whose first training kills its process, where the file `strike` is in MODELPRESS_HOME."""

    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        strike = Path(os.environ["MODELPRESS_HOME"]) / "strike"
        if split == "train" and seed is not None and strike.exists():
            strike.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batches(split, batch_size, seed)

    def identity(self) -> str:
        return "striking"


class Labelled(Small):
    """`Small` with an evaluation split from a file, which may hold other samples tomorrow: .npz, `inputs`, `labels`."""

    def __init__(self, path: str) -> None:
        super().__init__()
        with np.load(path) as data:
            self.rows["evaluation"], self.labels = torch.from_numpy(data["inputs"]), torch.from_numpy(data["labels"])

    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        labels = self.labels if split == "evaluation" else torch.zeros(len(self.rows[split]), dtype=torch.long)
        for part, right in zip(self.rows[split].split(batch_size), labels.split(batch_size), strict=True):
            yield Batch({"input": part}, right)

    def score(self, outputs: np.ndarray) -> np.ndarray:
        return (outputs.argmax(1) == self.labels.numpy()).astype(np.float64)

    def identity(self) -> str:
        return "labelled"


class Learning(Small):
    """`Small` whose source is trained on the spot, and whose student is narrower. While the file `pause` exists in
    MODELPRESS_HOME, training stands still: for tests that strike at a training that runs."""

    trains_source = True

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def skeleton(self, architecture: Mapping[str, Any]) -> nn.Module:
        net = Net(False)
        hidden = int(architecture.get("hidden", 128))
        net.first, net.second = nn.Linear(WIDTH, hidden), nn.Linear(hidden, CLASSES)
        return net

    def source(self, progress: Progress = silent) -> nn.Module:
        config = TrainConfig(epochs=3, batch_size=20)
        return trained(self, lambda: self.skeleton({}), config, progress)

    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        rows = self.rows[split]
        if seed is not None:
            rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
        pause = Path(os.environ.get("MODELPRESS_HOME", ".modelpress")) / "pause"
        self.passes += split == "train" and seed is not None
        for number, part in enumerate(rows.split(batch_size)):
            # The first pass only counts updates.
            while split == "train" and seed is not None and self.passes > 1 and number == 3 and pause.exists():
                (pause.parent / "paused").touch()
                time.sleep(0.02)
            yield Batch({"input": part}, (part.sum(1) > 0).long())

    def score(self, outputs: np.ndarray) -> np.ndarray:
        right = (self.rows["evaluation"].sum(1) > 0).long().numpy()
        return (outputs.argmax(1) == right).astype(np.float64)

    def identity(self) -> str:
        return "learning"
