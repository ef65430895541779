"""Source models that are trained on the spot, where a workload names data and no weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from modelpress.config import TrainConfig
from modelpress.place import resident
from modelpress.progress import Progress
from modelpress.train import train_
from modelpress.workload import Workload


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A module whose random numbers come from `seed`, and nobody else's are disturbed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def trained(workload: Workload, make: Callable[[], nn.Module], training: TrainConfig, progress: Progress) -> nn.Module:
    """A module by the workload's own loss, with AdamW; the same bits on the same machine and threads.

    Raises:
        StageError: see `train_`.
    """
    module = seeded(make, training.seed)
    with resident(module):
        train_(module, lambda model, batch: workload.loss(model(**batch.inputs), batch), workload, training, progress)
    return module.eval()
