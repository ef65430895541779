"""Weight-only quantization of a torch module's linear layers, block by block, as its graph would be."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from modelpress.config import QuantizeConfig
from modelpress.errors import ConfigError, CoverageError, StageError
from modelpress.layerwise import LayerInputs, users, walk_
from modelpress.progress import Progress, silent
from modelpress.prune.select import select
from modelpress.quantize.gptq import gptq
from modelpress.quantize.groups import Grid, GroupedWeight, round_to_nearest
from modelpress.reports import LayersReport, RoundedLayer
from modelpress.residence import IN_MEMORY, Residence, visit_
from modelpress.workload import Workload

BATCH_SIZE = 32
"""Calibration samples at a time."""

MIN_ROWS = 16
"""Fewer inputs say nothing about a layer."""

NOT_READ = ("max_quality_drop", "embeddings", "smooth", "calibration", "percentile", "per_channel")
"""Options of the graph's methods."""

Put = Callable[[nn.Module, GroupedWeight], GroupedWeight]
"""Told of each quantized layer; returns the weight as it will be read again."""


def quantize_layers_(
    module: nn.Module,
    workload: Workload,
    config: QuantizeConfig,
    progress: Progress = silent,
    residence: Residence = IN_MEMORY,
    put: Put = lambda _, weight: weight,
    full_groups: bool = False,
) -> LayersReport:
    """Round the weights of linear layers to 4 or 8 bits in groups, in place; they stay floats of few values.

    GPTQ takes a layer's Hessian from the module whose earlier blocks are quantized already, as in the paper.

    Args:
        module: the module.
        workload: its calibration split is what GPTQ sees.
        config: `weight-only` with `rtn` or `gptq`; `targets` and `ignore` are module names or globs.
        progress: called once per block.
        residence: where the weights are.
        put: told of each layer.
        full_groups: refuse a layer whose inputs `group_size` does not divide.

    Raises:
        ConfigError: another method, an option that is not read here, or a pattern that matches nothing.
        CoverageError: nothing to quantize, or less than `min_coverage`.
        StageError: a weight that is not finite, or statistics that cannot be inverted; the layer is named.
    """
    _check(config)
    layers = _linears(module)
    chosen = select(list(layers), config.targets, config.ignore, "quantize")
    eligible = sum(layer.weight.numel() for layer in layers.values())
    touched = sum(layers[name].weight.numel() for name in chosen)
    if not chosen or touched < config.min_coverage * eligible:
        raise CoverageError(
            "choosing layers to quantize",
            found=f"{touched} of {eligible} weights of linear layers",
            expected=f"some, and at least quantize.min_coverage, {config.min_coverage:.1%}",
            fix="narrow quantize.ignore, or lower quantize.min_coverage",
        )
    for name in chosen:
        if full_groups and layers[name].in_features % config.group_size:
            raise StageError(
                f"quantizing {name}",
                found=f"{layers[name].in_features} inputs in groups of {config.group_size}",
                expected="groups that are all full",
                fix="lower quantize.group_size, or name the layer in quantize.ignore",
            )
    grid = Grid(config.num_bits, config.group_size, config.symmetric)
    rows: dict[str, RoundedLayer] = {}

    def round_(name: str, layer: nn.Module, inputs: LayerInputs | None) -> None:
        weight = layer.get_parameter("weight")
        before = weight.detach().float()
        try:
            if inputs is None:
                rounded = round_to_nearest(before, grid)
            else:
                rounded = gptq(before, inputs.second_moment, grid, config.act_order)
        except StageError as error:
            doing = f"quantizing {name}: {error.doing}"
            raise StageError(doing, found=error.found, expected=error.expected, fix=error.fix) from error
        after = put(layer, rounded).dequantize()
        rows[name] = _row(name, before, after, grid, inputs)
        weight.copy_(after)

    if config.algorithm == "gptq":
        batches = list(workload.batches("calibration", BATCH_SIZE))
        walk_(
            *(module, chosen, batches, lambda inputs: round_(inputs.name, inputs.layer, inputs)),
            min_rows=MIN_ROWS,
            progress=progress,
            residence=residence,
        )
    else:
        visit_(module, chosen, lambda name, layer: round_(name, layer, None), progress=progress, residence=residence)
    return LayersReport(
        method=f"weight-only-{config.algorithm}-int{config.num_bits}",
        eligible_weights=eligible,
        quantized_weights=touched,
        coverage=touched / eligible,
        layers=[rows[name] for name in chosen],
    )


def _check(config: QuantizeConfig) -> None:
    if config.method != "weight-only" or config.algorithm == "hqq":
        raise ConfigError(
            "quantizing the layers of a module",
            found=f"quantize.method {config.method!r}"
            + (f" with quantize.algorithm {config.algorithm!r}" if config.method == "weight-only" else ""),
            expected="'weight-only' with 'rtn' or 'gptq'",
            fix="quantize the graph: the line (modelpress run)",
        )
    defaults = {name: field.default for name, field in QuantizeConfig.model_fields.items()}
    unread = [name for name in NOT_READ if getattr(config, name) != defaults[name]]
    if unread:
        raise ConfigError(
            "quantizing the layers of a module",
            found=", ".join(f"quantize.{name} {getattr(config, name)!r}" for name in unread),
            expected="only options that are read here: the graph's methods have these",
            fix="leave them out",
        )


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers, each weight once; without those whose weight is an embedding's as well."""
    found: dict[str, nn.Linear] = {}
    for name, child in module.named_modules():
        if not isinstance(child, nn.Linear) or any(child.weight is other.weight for other in found.values()):
            continue
        if all(isinstance(user, nn.Linear) for user in users(module, child)):
            found[name] = child
    return found


def _row(name: str, before: Tensor, after: Tensor, grid: Grid, inputs: LayerInputs | None) -> RoundedLayer:
    """What rounding did to a layer: ‖W − Ŵ‖² ÷ ‖W‖², and tr(ΔHΔᵀ) ÷ tr(WHWᵀ)."""
    delta = (before - after).double()

    def energy(weight: Tensor) -> float:
        assert inputs is not None
        return float(((weight @ inputs.second_moment) * weight).sum())

    def share(part: float, whole: float) -> float:
        return part / whole if whole else 0.0

    return RoundedLayer(
        name=f"{name}.weight",
        shape=list(before.shape),
        num_bits=grid.num_bits,
        weight_error=share(float(delta.square().sum()), float(before.double().square().sum())),
        calibration_rows=inputs.rows if inputs else None,
        output_error=share(energy(delta), energy(before.double())) if inputs else None,
    )
