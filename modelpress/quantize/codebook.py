"""Weight sharing: each weight tensor holds few values, which are then trained (Han et al. 2016, arXiv:1510.00149).

Section 3 of the paper, in short: weights are put into clusters by k-means, each cluster has one value, its centroid,
and the gradient of a centroid is the sum of its members' gradients. Zeros of pruning are no cluster: they stay zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from modelpress.config import QuantizeConfig, TrainConfig
from modelpress.distill import RECOVERY_LOSS, distillation_loss, frozen, without_dropout
from modelpress.errors import CoverageError, StageError
from modelpress.progress import Progress, silent
from modelpress.prune.select import select
from modelpress.quantize.kmeans import best_centroids, nearest
from modelpress.reports import CodebookReport, SharedTensor, TrainReport
from modelpress.train import train_
from modelpress.workload import Workload


def cluster_(
    module: nn.Module, workload: Workload, config: QuantizeConfig, progress: Progress = silent
) -> CodebookReport:
    """Let each chosen weight of `module` hold at most 2^num_bits values, in place, 0 among them.

    The weights of linear and convolution layers, and with `config.embeddings` those of embedding tables; one that
    several modules share is one. With `config.recovery` the values are trained on the answers of the module as it was,
    and with them every parameter that is not shared; what is equal stays equal, and what is zero stays zero.

    Raises:
        ConfigError: a pattern in `targets` or `ignore` that matches no such module.
        CoverageError: no such module.
        StageError: weights that are NaN or infinite (the module is named), or a failed training.
    """
    weights = clusterable_weights(module, config.embeddings)
    names = select(list(weights), config.targets, config.ignore, stage="quantize")
    if not names:
        raise CoverageError(
            "choosing the weights to share",
            found=f"none of {len(weights)} layers",
            expected="at least one",
            fix="narrow quantize.ignore",
        )
    for name in names:
        _check_finite(name, weights[name])
    original = copy.deepcopy(module)
    shared: dict[str, _Shared] = {}
    rows = []
    for done, name in enumerate(names):
        progress(done, len(names), f"clustering {name}")
        before = weights[name].detach().clone()
        shared[name] = _Shared(before, 2**config.num_bits - 1)
        shared[name].fill_(weights[name])
        rows.append(_row(name, before, weights[name].detach()))
    recovery = None
    if config.recovery is not None:
        recovery = _train(module, original, shared, weights, workload, config.recovery, progress)
        for name, one in shared.items():
            one.fill_(weights[name])
    return CodebookReport(
        num_bits=config.num_bits,
        eligible_weights=sum(weight.numel() for weight in weights.values()),
        shared_weights=sum(weights[name].numel() for name in names),
        tensors=rows,
        recovery=recovery,
    )


def clusterable_weights(module: nn.Module, embeddings: bool) -> dict[str, Tensor]:
    """Weights of linear and convolution layers, and of embedding tables if asked for, by module; shared ones once.

    Raises:
        CoverageError: there are none.
    """
    found: dict[str, Tensor] = {}
    known: set[int] = set()
    for name, child in module.named_modules():
        taken = isinstance(child, nn.Linear | nn.Conv1d | nn.Conv2d) or (embeddings and isinstance(child, nn.Embedding))
        weight = child.weight if taken else None
        if isinstance(weight, Tensor) and id(weight) not in known:
            known.add(id(weight))
            found[name] = weight
    if not found:
        raise CoverageError(
            f"sharing the weights of {type(module).__name__}",
            found="no linear or convolution layer",
            expected="at least one",
            fix="another quantize.method",
        )
    return found


def _check_finite(name: str, weight: Tensor) -> None:
    if not torch.isfinite(weight).all():
        raise StageError(
            f"sharing the weights of {name!r}",
            found="weights that are NaN or infinite",
            expected="finite weights",
            fix=f"look at the training that the model comes from, or add {name!r} to quantize.ignore",
        )


class _Shared(nn.Module):
    """One weight tensor as the places of its nonzero elements, the cluster of each, and the clusters' values."""

    places: Tensor
    members: Tensor

    def __init__(self, weight: Tensor, count: int) -> None:
        super().__init__()
        self.shape = weight.shape
        flat = weight.detach().flatten()
        places = flat.nonzero().flatten()
        values = flat[places].cpu().numpy()
        centroids = best_centroids(values, count) if values.size else values.astype(np.float64)
        self.register_buffer("places", places)
        self.register_buffer("members", torch.from_numpy(nearest(values, centroids)).to(flat.device))
        self.centroids = nn.Parameter(torch.from_numpy(centroids).to(flat))

    def weight(self) -> Tensor:
        """The whole tensor; in its gradient a centroid's is the sum over its members."""
        values = self.centroids.index_select(0, self.members)
        zeros = values.new_zeros(self.shape.numel())
        return zeros.index_copy(0, self.places, values).view(self.shape)

    def fill_(self, weight: Tensor) -> None:
        """Write the tensor into `weight`."""
        with torch.no_grad():
            weight.copy_(self.weight())


class _Sharing(nn.Module):
    """A module that runs on shared weights; itself it stays as it is, and learns its other parameters."""

    def __init__(self, module: nn.Module, shared: Mapping[str, _Shared]) -> None:
        super().__init__()
        self.module = module
        self.names = [f"{name}.weight" for name in shared]
        self.shared = nn.ModuleList(shared.values())

    def forward(self, **inputs: Tensor) -> Tensor:
        """What the module answers; a weight that several of its modules share is replaced in each."""
        weights = {name: one.weight() for name, one in zip(self.names, self.shared, strict=True)}  # type: ignore[operator]
        return torch.as_tensor(functional_call(self.module, weights, kwargs=inputs, tie_weights=True))


def _train(
    module: nn.Module,
    teacher: nn.Module,
    shared: Mapping[str, _Shared],
    weights: Mapping[str, Tensor],
    workload: Workload,
    config: TrainConfig,
    progress: Progress,
) -> TrainReport:
    """Train the centroids, and the parameters that are not shared, on the teacher's answers."""
    trainable = {name: weights[name].requires_grad for name in shared}
    for name in shared:
        weights[name].requires_grad_(False)
    try:
        with frozen(teacher), without_dropout(module):
            loss = distillation_loss(teacher, workload, RECOVERY_LOSS)
            return train_(_Sharing(module, shared), loss, workload, config, progress)
    finally:
        for name, gradient in trainable.items():
            weights[name].requires_grad_(gradient)


def _row(name: str, before: Tensor, after: Tensor) -> SharedTensor:
    error, power = (before - after).double().square().mean(), before.double().square().mean()
    return SharedTensor(
        name=f"{name}.weight",
        shape=list(before.shape),
        values=int(torch.unique(after).numel()),
        zeros=int((after == 0).sum()),
        relative_error=float((error / power).sqrt()) if power else 0.0,
    )
