"""Small modules and workloads that the tests of graphs share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelpress.progress import Progress, silent
from modelpress.workload import SPLITS, Batch, Split, Workload


class Wrapped(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def make_cnn(seed: int = 0) -> Wrapped:
    """Two convolutions and two linear layers on (batch, 1, 8, 8); 4,064 weights."""
    torch.manual_seed(seed)
    body = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(192, 16),
        nn.ReLU(),
        nn.Linear(16, 10),
    )
    return Wrapped(body).eval()


CNN_WEIGHTS = {"body.0.Conv": 72, "body.3.Conv": 864, "body.7.Gemm": 3072, "body.9.Gemm": 160}
"""Weighted nodes of `make_cnn` and their weights, counted by hand."""


class ImageToy(Workload):
    """Random images; the score is whether the class is 0."""

    metric = "accuracy"

    def __init__(self, module: nn.Module | None = None, samples: int = 48) -> None:
        self.module = module or make_cnn()
        self.samples = samples

    def source(self, progress: Progress = silent) -> nn.Module:
        return self.module

    def skeleton(self, architecture: Mapping[str, Any]) -> nn.Module:
        return make_cnn(seed=1)

    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        images = torch.randn(self.samples, 1, 8, 8, generator=torch.Generator().manual_seed(SPLITS.index(split)))
        for start in range(0, self.samples, batch_size):
            yield Batch({"x": images[start : start + batch_size]})

    def score(self, outputs: np.ndarray) -> np.ndarray:
        return (outputs.argmax(axis=1) == 0).astype(np.float64)

    def identity(self) -> str:
        return "image-toy"


class TinyEncoder(nn.Module):
    """An embedding table, two linear layers around a GELU, a masked mean: the shape of a sentence encoder."""

    def __init__(self, seed: int = 0, width: int = 32, words: int = 100) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(words, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.table(ids)
        hidden = hidden + self.down(nn.functional.gelu(self.up(hidden)))
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


ENCODER_WEIGHTS = {"table.Gather": 3200, "up.MatMul": 2048, "down.MatMul": 2048}
"""Weighted nodes of `TinyEncoder` and their weights, counted by hand."""


class TextToy(Workload):
    """Random token sequences whose length differs between batches; the score is the first component's sign."""

    metric = "positive"
    output_name = "embedding"

    def __init__(self, module: nn.Module | None = None, samples: int = 48) -> None:
        self.module = module or TinyEncoder().eval()
        self.samples = samples

    def source(self, progress: Progress = silent) -> nn.Module:
        return self.module

    def skeleton(self, architecture: Mapping[str, Any]) -> nn.Module:
        return TinyEncoder(seed=1)

    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(SPLITS.index(split))
        for start in range(0, self.samples, batch_size):
            rows = min(batch_size, self.samples - start)
            length = 6 + start // batch_size
            ids = torch.randint(0, 100, (rows, length), generator=generator)
            yield Batch({"ids": ids, "mask": torch.ones(rows, length, dtype=torch.int64)})

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        return {name: {0: "batch", 1: "length"} for name in ("ids", "mask")}

    def score(self, outputs: np.ndarray) -> np.ndarray:
        return (outputs[:, 0] > 0).astype(np.float64)

    def identity(self) -> str:
        return "text-toy"
