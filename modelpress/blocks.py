"""The repeated layers of a model: which they are, and how some are taken out for good."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from modelpress.errors import WorkloadError

PLAIN = (bool, int, float, str)
SIZES = {"in_features", "out_features", "in_channels", "out_channels", "groups", "num_features"}
"""What follows from the tensors: see `modelpress.checkpoint.sync_sizes`."""


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
    for config in _configs(module, layers, before):
        config.num_hidden_layers = len(kept)
        for key, value in _layer_types(config, before).items():
            setattr(config, key, [value[index] for index in kept])


def unlike(module: nn.Module, gone: Collection[int]) -> str:
    """Why a model without these layers cannot be rebuilt from its tensors; empty where it can.

    A checkpoint has the tensors, and the skeleton's first layers to put them into: layers that differ in anything else
    (a sliding window, an activation) would take over what those before them do, and inputs as short as the calibration
    data may not show it. Numbers that count the layers may differ, and settings of modules without parameters (a rate).
    """
    layers = list(layer_list(module))
    kept = [index for index in range(len(layers)) if index not in gone]
    for number, index in enumerate(kept):
        first, mine = (dict(layers[one].named_modules()) for one in (number, index))
        for name in sorted(first.keys() | mine.keys()):
            if name not in first or name not in mine:
                return f"layers {number} and {index}, of which one has no {name}"
            found, expected = _traits(mine[name]), _traits(first[name])
            for key in sorted(found.keys() | expected.keys()):
                one, other = expected.get(key), found.get(key)
                counts = type(one) is type(other) is int and other - one == index - number
                if one != other and not counts:
                    where = f"{name}.{key}" if name else key
                    return f"layers {number} and {index}, whose {where} is {one!r} and {other!r}"
    for config in _configs(module, layer_list(module), len(layers)):
        for key, types in _layer_types(config, len(layers)).items():
            if [types[index] for index in kept] != types[: len(kept)]:
                return f"layers of {key} {types}"
    return ""


def _traits(module: nn.Module) -> dict[str, Any]:
    """What a module is beside its tensors, as far as it is plain: its class, flags, numbers and texts."""
    if not any(True for _ in module.parameters()):
        return {"class": type(module).__qualname__}
    plain = {
        key: value
        for key, value in vars(module).items()
        if key not in SIZES and (value is None or isinstance(value, PLAIN))
    }
    return {"class": type(module).__qualname__, **plain}


def _configs(module: nn.Module, layers: nn.ModuleList, count: int) -> list[Any]:
    """Configs of the modules around a list of layers that say it has so many."""
    found: dict[int, Any] = {}
    for owner in module.modules():
        config: Any = getattr(owner, "config", None)
        if getattr(config, "num_hidden_layers", None) != count or getattr(config, "is_encoder_decoder", False):
            continue
        if any(child is layers for child in owner.modules()):
            found[id(config)] = config
    return list(found.values())


def _layer_types(config: Any, layers: int) -> dict[str, list[Any]]:
    return {
        key: value
        for key, value in vars(config).items()
        if key.endswith("layer_types") and isinstance(value, list) and len(value) == layers
    }


def sketch(module: nn.Module) -> nn.Module:
    """A copy of the modules that shares the tensors: another structure can be tried on it, and no value changed."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
