"""The repeated layers of a model: which they are, and how some are taken out for good."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from modelpress.errors import WorkloadError


def layer_list(module: nn.Module) -> nn.ModuleList:
    """The `ModuleList` that holds most of a module's parameters: an encoder's or decoder's layers.

    Raises:
        WorkloadError: there is none.
    """
    lists = [child for child in module.modules() if isinstance(child, nn.ModuleList) and len(child)]
    if not lists:
        raise WorkloadError(
            f"looking for the layers of {type(module).__name__}",
            found="no torch.nn.ModuleList",
            expected="layers in a ModuleList",
            fix="set distill.student to 'architecture'",
        )
    return max(lists, key=count_parameters)


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def drop_layers_(module: nn.Module, gone: Collection[int]) -> None:
    """Remove layers of `layer_list(module)`, by number, in place; what counts them counts anew.

    That is the layers' own `layer_idx`, by which attention finds its cache, and `num_hidden_layers` and `layer_types`
    of transformers' configs, so that `save_pretrained` writes a folder that loads.
    """
    layers = layer_list(module)
    before = len(layers)
    kept = [index for index in range(before) if index not in gone]
    for index in sorted(gone, reverse=True):
        del layers[index]
    for number, (old, layer) in enumerate(zip(kept, layers, strict=True)):
        for child in layer.modules():
            if getattr(child, "layer_idx", None) == old:
                child.layer_idx = number  # type: ignore[assignment]
    sync_depth(module, layers, before, kept)


def sync_depth(module: nn.Module, layers: nn.ModuleList, before: int, kept: Sequence[int]) -> None:
    """Make the configs of the modules around a list of layers say how many there are, and of which types.

    Args:
        module: the whole model. A config that speaks of an encoder and a decoder at once is left alone.
        layers: the list as it is now.
        before: layers that it had.
        kept: which of them it still has.
    """
    for owner in module.modules():
        config: Any = getattr(owner, "config", None)
        if getattr(config, "num_hidden_layers", None) != before or getattr(config, "is_encoder_decoder", False):
            continue
        if not any(child is layers for child in owner.modules()):
            continue
        config.num_hidden_layers = len(kept)
        for key, value in list(vars(config).items()):
            if key.endswith("layer_types") and isinstance(value, list) and len(value) == before:
                setattr(config, key, [value[index] for index in kept])


def sketch(module: nn.Module) -> nn.Module:
    """A copy of the modules that shares the tensors: another structure can be tried on it, and no value changed."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
