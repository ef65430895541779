"""A workload small enough for milliseconds: three classes of noisy points, or any module on random inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelpress.progress import Progress, silent
from modelpress.workload import Batch, Outputs, Split, Workload


def mlp(width: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


class Named(nn.Module):
    """Lets a module of one positional argument be called by the name `x`."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.body(x)
        return answer


class Toy(Workload):
    """Random inputs of one shape in three splits, labelled by a fixed random linear map."""

    metric = "accuracy"

    def __init__(
        self,
        make: Callable[..., nn.Module] = mlp,
        shape: tuple[int, ...] = (4,),
        samples: int = 96,
        outputs: Outputs = "logits",
        seed: int = 0,
    ) -> None:
        self.make = make
        self.outputs = outputs  # type: ignore[misc]
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(samples, *shape, generator=generator)
        weights = torch.randn(int(np.prod(shape)), 3, generator=generator)
        self.y = (self.x.flatten(1) @ weights).argmax(1)
        half, fourth = samples // 2, samples // 4
        self.rows = {
            "train": torch.arange(half),
            "calibration": torch.arange(half, half + fourth),
            "evaluation": torch.arange(half + fourth, samples),
        }

    def source(self, progress: Progress = silent) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.skeleton({}).eval()

    def skeleton(self, architecture: Mapping[str, Any]) -> nn.Module:
        return Named(self.make(**architecture))

    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        rows = self.rows[split]
        if seed is not None:
            rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
        for part in torch.split(rows, batch_size):
            yield Batch({"x": self.x[part]}, self.y[part])

    def score(self, outputs: np.ndarray) -> np.ndarray:
        return np.asarray(outputs.argmax(1) == self.y[self.rows["evaluation"]].numpy(), dtype=np.float64)

    def identity(self) -> str:
        return "toy"
