"""Batch normalisation over the batch of all ranks, on any device.

PyTorch's `SyncBatchNorm` (and its CUDA kernels) does this on GPUs alone, and refuses the CPU. Here it is sums over the
ranks that autograd sees: the gradient of a sum over ranks is the sum of the ranks' gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from modelpress.parallel import turn
from modelpress.parallel.ranks import Ranks


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The layers whose outputs hang on the whole batch, in training."""
    return [child for child in module.modules() if isinstance(child, _BatchNorm)]


@contextmanager
def over_ranks(module: nn.Module, ranks: Ranks) -> Iterator[None]:
    """While this is open, the module's batch normalisations take mean and variance over the batch of all ranks."""
    layers = batch_norms(module)
    for layer in layers:
        layer.forward = _Forward(layer, ranks)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class _Forward:
    """The forward pass of a layer."""

    def __init__(self, layer: _BatchNorm, ranks: Ranks) -> None:
        self.layer, self.ranks = layer, ranks

    def __call__(self, value: Tensor) -> Tensor:
        layer = self.layer
        if not layer.training and layer.running_mean is not None:
            return type(layer).forward(layer, value)
        now = turn.current()
        here = 0.0 if now is not None and not now.share else 1.0  # a stand-in's samples count as nothing
        axes = [axis for axis in range(value.dim()) if axis != 1]
        shape = [1, -1] + [1] * (value.dim() - 2)
        (count,) = self.ranks.sum([here * value.numel() / value.shape[1]])
        mean = _sum(value.sum(axes) * here, self.ranks) / count
        centred = value - mean.view(shape)
        # From the differences, and not from the mean of the squares: those would cancel.
        variance = _sum(centred.square().sum(axes) * here, self.ranks) / count
        if layer.training and layer.running_mean is not None:
            self._follow(mean.detach(), variance.detach() * (count / max(1.0, count - 1)))
        scaled = centred * torch.rsqrt(variance + layer.eps).view(shape)
        if layer.weight is None:
            return scaled
        return scaled * layer.weight.view(shape) + layer.bias.view(shape)

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        layer = self.layer
        assert layer.running_mean is not None
        assert layer.running_var is not None
        assert layer.num_batches_tracked is not None
        with torch.no_grad():
            layer.num_batches_tracked += 1
            share = 1.0 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
            layer.running_mean.mul_(1 - share).add_(mean, alpha=share)
            layer.running_var.mul_(1 - share).add_(variance, alpha=share)


def _sum(value: Tensor, ranks: Ranks) -> Tensor:
    found: Tensor = _Sum.apply(value, ranks)  # type: ignore[no-untyped-call]
    return found


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return _summed(value, ranks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed(gradients[0], ctx.ranks), None


def _summed(value: Tensor, ranks: Ranks) -> Tensor:
    whole = value.detach().clone().contiguous()
    ranks.traffic.summed("control", whole.nbytes)
    dist.all_reduce(whole)
    return whole
