"""Training in a process that may take only so much more memory: `python -m tests.train.limited FAIL-OR-HALVE MIB`.

A third argument is the width inside; with 0 MiB there is no limit. Prints JSON: report and weights, or the error.
"""

from __future__ import annotations

import json
import resource
import sys

import psutil
import torch
from torch import nn

from modelpress.config import TrainConfig
from modelpress.errors import OutOfMemoryError
from modelpress.train import train_
from tests.train.toy import Toy


class Wide(nn.Module):
    """Little to store and much to compute: (batch, 4) → (batch, width) → (batch, 3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.last = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.tanh(x.repeat(1, self.width // 4))
        return self.last(torch.tanh(wide).view(len(x), -1, 4).mean(1))


class Apart(Toy):
    """A workload whose loss compares the samples of a batch."""

    samples_stand_alone = False


def main(out_of_memory: str, mib: int, width: int = 400_000) -> None:
    torch.set_num_threads(1)
    workload = (Apart if out_of_memory == "apart" else Toy)(lambda: Wide(width), samples=128)
    mode = "halve" if out_of_memory == "apart" else out_of_memory
    config = TrainConfig(epochs=2, batch_size=64, optimizer="sgd", out_of_memory=mode)  # type: ignore[arg-type]
    module = workload.source()
    workload.loss(module(workload.x[:2]), next(workload.batches("train", 2))).backward()  # what is made at first use
    if mib:
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + mib * 2**20,) * 2)
    try:
        report = train_(module, lambda one, batch: workload.loss(one(**batch.inputs), batch), workload, config)
    except OutOfMemoryError as error:
        print(json.dumps({"error": str(error)}))
        return
    weights = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    print(json.dumps({"report": report.model_dump(mode="json"), "weights": weights.tolist()}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
