"""Looking into a model while it runs, and holding one still."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """`module` in eval mode and without gradients; afterwards every part is as it was before."""
    modes = [(child, child.training) for child in module.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    module.eval().requires_grad_(False)
    try:
        yield module
    finally:
        for child, mode in modes:
            child.training = mode
        for parameter, gradient in gradients:
            parameter.requires_grad_(gradient)


@contextlib.contextmanager
def recorded(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """A list that holds the modules' outputs (the first, where it is a tuple) of the latest forward pass, in order."""
    states: list[Tensor] = [torch.empty(0)] * len(modules)

    def keep(index: int) -> object:
        def hook(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            states[index] = output if isinstance(output, Tensor) else output[0]

        return hook

    handles = [module.register_forward_hook(keep(index)) for index, module in enumerate(modules)]  # type: ignore[arg-type]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def without_dropout(module: nn.Module) -> Iterator[nn.Module]:
    """`module` with all dropout off, in training too: what is to be imitated was made without noise."""
    layers = [child for child in module.modules() if isinstance(child, nn.modules.dropout._DropoutNd)]
    attentions = [child for child in module.modules() if isinstance(child, nn.MultiheadAttention)]
    shares = [layer.p for layer in layers], [attention.dropout for attention in attentions]
    for layer in layers:
        layer.p = 0.0
    for attention in attentions:
        attention.dropout = 0.0
    try:
        yield module
    finally:
        for layer, share in zip(layers, shares[0], strict=True):
            layer.p = share
        for attention, share in zip(attentions, shares[1], strict=True):
            attention.dropout = share
