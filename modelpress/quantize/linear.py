"""Weight-only quantization of a torch module's linear layers, by the numbers that graphs get.

The functions that round are those of `weight_only`; only what GPTQ measures comes from elsewhere: the second moments
are gathered block by block in the module (`layerwise.walk_`) instead of in its graph. The weights need not be in
memory: a `Residence` says where they are.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modelpress.config import QuantizeConfig
from modelpress.errors import ConfigError, CoverageError, StageError
from modelpress.layerwise import LayerInputs, walk_
from modelpress.moments import output_error
from modelpress.progress import Progress, silent
from modelpress.prune.select import matches
from modelpress.quantize import weight_only_method
from modelpress.quantize.float8 import round_to_float8
from modelpress.quantize.groups import Grid
from modelpress.quantize.packed import RoundedWeight
from modelpress.quantize.weight_only import naming, quantize_weight
from modelpress.reports import LayersReport, RoundedLayer
from modelpress.residence import IN_MEMORY, Residence, visit_
from modelpress.survey import users
from modelpress.workload import Workload

BATCH_SIZE = 32
"""Calibration samples at a time, at most."""

MIN_ROWS = 16
"""Fewer inputs say nothing about a layer."""

_SMALLEST_GROUP = 16
_ERROR_ROWS = 128

Put = Callable[[str, nn.Module, RoundedWeight], None]
"""Told of each layer, by its name in the model, and its rounded weight."""


@dataclass(frozen=True)
class Choice:
    """Which linear layers of a model are rounded; names are the model's."""

    layers: dict[str, nn.Linear]
    """Those that are."""
    in_float: list[str]
    """Those that are not."""
    eligible_weights: int
    """Weights of the layers that could be."""


def check_config(config: QuantizeConfig) -> None:
    """Refuse what the format cannot hold, before anything is loaded.

    Raises:
        ConfigError: another method than `weight-only`, real zero points, or embedding tables.
    """
    obstacles = {
        f"quantize.method {config.method!r}": ("'weight-only'", config.method != "weight-only"),
        "quantize.algorithm 'hqq', whose zero points are real numbers": (
            "'gptq', 'rtn' or 'fp8': zero points are integers here",
            config.algorithm == "hqq",
        ),
        "quantize.embeddings true": ("false: only linear layers are stored in few bits", config.embeddings),
    }
    for found, (expected, refused) in obstacles.items():
        if refused:
            raise ConfigError("preparing a compressed-tensors folder", found=found, expected=expected)


def choose_linears(model: nn.Module, config: QuantizeConfig) -> Choice:
    """The layers that `targets` and `ignore` leave, all of which the method can take.

    Not among them are the one that gives the tokens' logits, and those that share a weight with another layer or a
    table; `ignore` may name them all the same.

    Args:
        model: its weights may be meta tensors; they are looked at when they are read.
        config: patterns of the layers' names, the method and its groups.

    Raises:
        ConfigError: see `check_config`; a pattern that matches nothing, or a target that stays in float.
        CoverageError: nothing is eligible, nothing is left, or less than `min_coverage`.
        StageError: groups that do not divide a layer's inputs, or a weight that is not finite.
    """
    check_config(config)
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    logits = _logits_layer(model)
    eligible = {name: layer for name, layer in linears.items() if layer is not logits and len(users(model, layer)) == 1}
    for pattern in config.targets:
        _check_pattern(pattern, "targets", eligible, linears)
    for pattern in config.ignore:
        _check_pattern(pattern, "ignore", linears, linears)
    chosen = {
        name: layer
        for name, layer in eligible.items()
        if (not config.targets or _matches(name, config.targets)) and not _matches(name, config.ignore)
    }
    total, taken = (sum(layer.weight.numel() for layer in some.values()) for some in (eligible, chosen))
    if not chosen or taken < config.min_coverage * total:
        raise CoverageError(
            "choosing linear layers to quantize",
            found=f"{len(chosen) or 'none'} of {len(eligible)} eligible nn.Linear layers, {taken} of {total} weights",
            expected=f"some, and at least quantize.min_coverage, {config.min_coverage:.1%}",
            fix="widen quantize.targets, narrow quantize.ignore, or lower quantize.min_coverage"
            if eligible
            else "other kinds of layers (Conv1D of GPT-2, fused experts) have no such form: use the ONNX graph",
        )
    if config.algorithm != "fp8":
        _check_groups(chosen, config.group_size)
    for name, layer in chosen.items():
        wrong = 0 if layer.weight.is_meta else int((~torch.isfinite(layer.weight)).sum())
        if wrong:
            raise StageError(
                f"quantizing {name!r}",
                found=f"{wrong} of its weights NaN or infinite",
                expected="finite weights",
                fix="repair the model, or name the layer in quantize.ignore",
            )
    return Choice(chosen, [name for name in linears if name not in chosen], total)


def round_linears_(
    module: nn.Module,
    choice: Choice,
    workload: Workload,
    config: QuantizeConfig,
    *,
    prefix: str = "",
    stored_as: Callable[[nn.Module], torch.dtype] = lambda _: torch.float32,
    put: Put = lambda *_: None,
    residence: Residence = IN_MEMORY,
    progress: Progress = silent,
) -> LayersReport:
    """Round the weights of linear layers in place: they become what a reader of the stored codes computes with.

    GPTQ sees the calibration split as the layers that are rounded already give it, block by block.

    Args:
        module: takes `Batch.inputs` as keyword arguments.
        choice: see `choose_linears`.
        workload: calibration data, for `gptq`.
        config: the algorithm, the bits and the groups.
        prefix: what the module's names have before those of `choice`.
        stored_as: the dtype that a layer's scales will have, and its weight where it is read as floats.
        put: told of each layer.
        residence: where the weights are.
        progress: told of each block.

    Raises:
        StageError: a dtype that does not hold a layer's scales; see `walk_` and `weight_only.quantize_weight`.
    """
    rows: dict[str, RoundedLayer] = {}

    def round_(full: str, layer: nn.Module, inputs: LayerInputs | None = None) -> None:
        name, dtype = full.removeprefix(prefix), stored_as(layer)
        weight = layer.get_parameter("weight")
        before = weight.detach().float()
        rounded = _rounded(name, before, config, dtype, inputs.second_moment if inputs else None)
        after = rounded.dequantize().to(dtype).float()
        if not torch.isfinite(after).all():
            raise StageError(
                f"quantizing {name!r}",
                found=f"values that {dtype} does not hold",
                expected="finite scales and weights",
                fix="name the layer in quantize.ignore",
            )
        rows[name] = _row(name, before, after, config.num_bits, inputs)
        weight.copy_(after)
        put(name, layer, rounded)

    names = [f"{prefix}{name}" for name in choice.layers]
    with torch.no_grad():
        if config.algorithm == "gptq":
            batches = list(workload.batches("calibration", min(BATCH_SIZE, workload.evaluation_batch_size)))
            walk_(
                *(module, names, batches, lambda inputs: round_(inputs.name, inputs.layer, inputs)),
                min_rows=MIN_ROWS,
                progress=progress,
                residence=residence,
            )
        else:
            visit_(module, names, round_, progress=progress, residence=residence)
    taken = sum(layer.weight.numel() for layer in choice.layers.values())
    return LayersReport(
        method=weight_only_method(config),
        eligible_weights=choice.eligible_weights,
        quantized_weights=taken,
        coverage=taken / choice.eligible_weights,
        layers=[rows[name] for name in choice.layers],
    )


def _rounded(
    name: str, weight: Tensor, config: QuantizeConfig, dtype: torch.dtype, hessian: Tensor | None
) -> RoundedWeight:
    if config.algorithm == "fp8":
        with naming([name]):
            return round_to_float8(weight, 0 if config.per_channel else None, dtype)
    grid = Grid(config.num_bits, config.group_size, config.symmetric, scale_dtype=dtype)
    return quantize_weight([name], weight, grid, config, hessian)


def _row(name: str, before: Tensor, after: Tensor, num_bits: int, inputs: LayerInputs | None) -> RoundedLayer:
    """What rounding did to a layer: ‖W − Ŵ‖² ÷ ‖W‖², and tr(ΔHΔᵀ) ÷ tr(WHWᵀ)."""
    changed = whole = 0.0
    for old, new in zip(torch.split(before, _ERROR_ROWS), torch.split(after, _ERROR_ROWS), strict=True):
        whole += float(old.double().square().sum())
        changed += float((old - new).double().square().sum())
    return RoundedLayer(
        name=f"{name}.weight",
        shape=list(before.shape),
        num_bits=num_bits,
        weight_error=changed / whole if whole else 0.0,
        calibration_rows=inputs.rows if inputs else None,
        output_error=output_error(before, after, inputs.second_moment) if inputs else None,
    )


def _logits_layer(model: nn.Module) -> nn.Module | None:
    """What the outermost transformers model makes its answers with."""
    for child in model.modules():
        if isinstance(child, PreTrainedModel):
            found: nn.Module | None = child.get_output_embeddings()  # type: ignore[no-untyped-call]
            return found
    return None


def _check_pattern(pattern: str, field: str, known: Mapping[str, object], linears: Mapping[str, object]) -> None:
    if any(matches(name, pattern) for name in known):
        return
    if any(matches(name, pattern) for name in linears):
        raise ConfigError(
            f"matching quantize.{field} against the module",
            found=f"{pattern!r}, which gives the logits or shares its weight with another layer",
            expected="a layer with a weight of its own: this one stays in float",
        )
    near = difflib.get_close_matches(pattern, list(known), n=3, cutoff=0.3)
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
    return any(matches(name, pattern) for pattern in patterns)
