"""Models in which chosen layers are quantized, by each method: what is prepared once, and what is made of it."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import ModelProto

from modelpress.config import QuantizeConfig
from modelpress.progress import Progress
from modelpress.quantize import float8, nbits, rewrite, sensitivity, static, weight_only
from modelpress.quantize.frozen import Frozen
from modelpress.quantize.gelu import respell_gelu_
from modelpress.quantize.groups import Grid, GroupedWeight
from modelpress.quantize.observe import Inputs
from modelpress.quantize.ranges import Observer
from modelpress.quantize.selection import Layer
from modelpress.quantize.smooth import smooth


def builder(
    model: ModelProto,
    layers: Sequence[Layer],
    batches: Sequence[Inputs],
    config: QuantizeConfig,
    progress: Progress,
    frozen: Frozen | None = None,
    observer: Observer | None = None,
) -> sensitivity.Build:
    """Prepare the layers by the config's method, on calibration data: what it gives makes models of any of them.

    Args:
        model: float; for `static` as `static.prepare` gave it.
        layers: as `chosen_layers` gave them.
        batches: calibration data.
        config: the method and its options.
        progress: told of what is prepared.
        frozen: an earlier version, whose scales and smoothing are taken where it has them.
        observer: see `static.calibrate`.

    Raises:
        see `smooth`, `static.calibrate` and `weight_only.quantize_layers`.
    """
    products = [layer for layer in layers if layer.op_type != "Gather"]
    if config.method == "weight-only":
        build = _weight_only(model, products, batches, config, progress, frozen)
    else:
        build = _integer(model, products, batches, config, progress, frozen, observer)
    tables = [layer.node for layer in layers if layer.op_type == "Gather"]

    def build_all(nodes: Sequence[str], in_float: Sequence[str]) -> ModelProto:
        made = build(*([node for node in some if node not in tables] for some in (nodes, in_float)))
        rewrite.quantize_tables_(made, [node for node in nodes if node in tables], frozen)
        return made

    return build_all


def _integer(
    model: ModelProto,
    layers: Sequence[Layer],
    batches: Sequence[Inputs],
    config: QuantizeConfig,
    progress: Progress,
    frozen: Frozen | None,
    observer: Observer | None,
) -> sensitivity.Build:
    model = _copy(model)
    respell_gelu_(model)
    if config.smooth:
        progress(0, 1, "moving outliers of the activations into the weights")
        model = smooth(model, {layer.node for layer in layers}, batches, config.smooth, frozen)
    ranges = None
    if config.method == "static":
        progress(0, 1, f"calibrating by {config.calibration}")
        ranges = static.calibrate(model, batches, config, observer)

    def build(nodes: Sequence[str], in_float: Sequence[str]) -> ModelProto:
        if ranges is None:
            made = _copy(model)
            rewrite.quantize_dynamic_(made, nodes, config.per_channel, frozen)
        else:
            made = static.quantize_static(model, nodes, ranges, config, frozen)
        rewrite.quantize_weights_(made, in_float, config.per_channel, frozen)
        return made

    return build


def _weight_only(
    model: ModelProto,
    layers: Sequence[Layer],
    batches: Sequence[Inputs],
    config: QuantizeConfig,
    progress: Progress,
    frozen: Frozen | None,
) -> sensitivity.Build:
    if config.algorithm == "fp8":
        return _float8(model, layers, config)
    weights = weight_only.quantize_layers(model, layers, batches, config, progress, frozen)
    finer: dict[str, GroupedWeight] = {}
    if config.num_bits == 4:
        grid = Grid(8, config.group_size)
        wide = [layer for layer in layers if frozen is None or frozen.has_grid(layer.weight, grid)]
        finer = weight_only.round_layers(model, wide, grid, frozen)

    def build(nodes: Sequence[str], in_float: Sequence[str]) -> ModelProto:
        made = _copy(model)
        chosen = {node: weights[node] for node in nodes}
        nbits.replace_products_(made, chosen | {node: finer[node] for node in in_float if node in finer})
        return made

    return build


def _float8(model: ModelProto, layers: Sequence[Layer], config: QuantizeConfig) -> sensitivity.Build:
    weights = weight_only.float8_layers(model, layers, config.per_channel)

    def build(nodes: Sequence[str], _in_float: Sequence[str]) -> ModelProto:
        made = _copy(model)
        float8.store_(made, {node: weights[node] for node in nodes})
        return made

    return build


def _copy(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy
