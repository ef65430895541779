"""Weight-only quantization of a torch module's linear layers, by the numbers that graphs get.

The functions that round are those of `weight_only`; only what GPTQ measures comes from elsewhere: the second moments
are gathered block by block in the module (`layerwise.walk_`) instead of in its graph.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from modelpress.config import QuantizeConfig
from modelpress.errors import ConfigError, CoverageError, StageError
from modelpress.layerwise import LayerInputs, users, walk_
from modelpress.progress import Progress, silent
from modelpress.quantize.float8 import Float8Weight, round_to_float8
from modelpress.quantize.groups import Grid, GroupedWeight
from modelpress.quantize.weight_only import naming, quantize_weight
from modelpress.workload import Workload

RoundedWeight = GroupedWeight | Float8Weight

_BATCH = 32
_SMALLEST_GROUP = 16


def eligible_linears(module: nn.Module, outputs: nn.Module | None = None) -> dict[str, nn.Linear]:
    """The linear layers that may be rounded, by name: not the one that gives the tokens' logits, and none that shares
    its weight with another layer or a table."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and layer is not outputs and len(users(module, layer)) == 1
    }


def chosen_linears(
    eligible: Mapping[str, nn.Linear], others: Sequence[str], config: QuantizeConfig
) -> dict[str, nn.Linear]:
    """The layers that `targets` and `ignore` leave, all of which the method can take.

    Args:
        eligible: by name.
        others: names of linear layers that stay in float whatever the config says; `ignore` may name them.
        config: patterns of the layers' names, the method and its groups.

    Raises:
        ConfigError: a pattern that matches nothing, or a target that stays in float.
        CoverageError: nothing is eligible, or nothing is left.
        StageError: groups that do not divide a layer's inputs, or a weight that is not finite.
    """
    for field, known in (("targets", list(eligible)), ("ignore", [*eligible, *others])):
        for pattern in getattr(config, field):
            _check_pattern(pattern, field, known, others)
    chosen = {
        name: layer
        for name, layer in eligible.items()
        if (not config.targets or _matches(name, config.targets)) and not _matches(name, config.ignore)
    }
    if not chosen:
        raise CoverageError(
            "choosing linear layers to quantize",
            found=f"none of {len(eligible)} eligible nn.Linear layers",
            expected="at least one",
            fix="widen quantize.targets or narrow quantize.ignore"
            if eligible
            else "other kinds of layers (Conv1D of GPT-2, fused experts) have no such form: use the ONNX graph",
        )
    if config.algorithm != "fp8":
        _check_groups(chosen, config.group_size)
    for name, layer in chosen.items():
        wrong = int((~torch.isfinite(layer.weight)).sum())
        if wrong:
            raise StageError(
                f"quantizing {name!r}",
                found=f"{wrong} of its weights NaN or infinite",
                expected="finite weights",
                fix="repair the model, or name the layer in quantize.ignore",
            )
    return chosen


def round_linears_(
    module: nn.Module,
    names: Sequence[str],
    workload: Workload,
    config: QuantizeConfig,
    scale_dtype: torch.dtype = torch.float32,
    progress: Progress = silent,
) -> dict[str, RoundedWeight]:
    """Round the weights of linear layers in place, and say how they are stored.

    GPTQ sees the calibration split as the layers that are rounded already give it, block by block.

    Args:
        module: takes `Batch.inputs` as keyword arguments; its layers then hold what the codes stand for.
        names: of `nn.Linear` layers.
        workload: calibration data, for `gptq`.
        config: the algorithm, the bits and the groups.
        scale_dtype: what the scales will be stored in.
        progress: told of each layer, or block.

    Raises:
        StageError: see `chosen_linears`, `walk_` and `weight_only.quantize_weight`.
    """
    made: dict[str, RoundedWeight] = {}
    grid = Grid(config.num_bits, config.group_size, config.symmetric, scale_dtype=scale_dtype)

    @torch.no_grad()
    def put(name: str, layer: nn.Module, hessian: Tensor | None = None) -> None:
        weight = torch.as_tensor(layer.weight)
        if config.algorithm == "fp8":
            with naming([name]):
                made[name] = round_to_float8(weight, 0 if config.per_channel else None, scale_dtype)
        else:
            made[name] = quantize_weight([name], weight, grid, config, hessian)
        weight.copy_(made[name].dequantize())

    if config.algorithm == "gptq":

        def visit(inputs: LayerInputs) -> None:
            put(inputs.name, inputs.layer, inputs.second_moment)

        batches = list(workload.batches("calibration", min(_BATCH, workload.evaluation_batch_size)))
        walk_(module, list(names), batches, visit, progress=progress)
        return made
    for done, name in enumerate(names):
        progress(done, len(names), name)
        put(name, module.get_submodule(name))
    return made


def _check_pattern(pattern: str, field: str, known: Sequence[str], others: Sequence[str]) -> None:
    if any(fnmatchcase(name, pattern) for name in known):
        return
    if any(fnmatchcase(name, pattern) for name in others):
        raise ConfigError(
            f"matching quantize.{field} against the module",
            found=f"{pattern!r}, which gives the logits or shares its weight with another layer",
            expected="a layer with a weight of its own: this one stays in float",
        )
    near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3)
    raise ConfigError(
        f"matching quantize.{field} against the module",
        found=f"{pattern!r}, which matches none of {len(known)} linear layers",
        expected="a module name or glob" + (f", such as {', '.join(map(repr, near))}" if near else ""),
    )


def _check_groups(layers: Mapping[str, nn.Linear], size: int) -> None:
    ragged = {name: layer.in_features for name, layer in layers.items() if layer.in_features % size}
    if not ragged:
        return
    fitting = size
    while fitting >= _SMALLEST_GROUP and any(layer.in_features % fitting for layer in layers.values()):
        fitting //= 2
    name, inputs = next(iter(ragged.items()))
    raise StageError(
        "dividing weights into groups for compressed-tensors",
        found=f"{inputs} inputs of {name!r} ({len(ragged)} of {len(layers)} layers), quantize.group_size {size}",
        expected="groups that are all full: the format has no shorter last one",
        fix=f"set quantize.group_size to {fitting}"
        if fitting >= _SMALLEST_GROUP
        else "name those layers in quantize.ignore, or set quantize.algorithm to 'fp8', which has no groups",
    )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
