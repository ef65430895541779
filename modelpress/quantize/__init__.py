"""From a float ONNX graph to one with integer weights, and mostly integer activations, within a quality budget.

`dynamic` ranges activations per call, `static` by calibration; for both, outliers are first moved from the activations
into the weights. `weight-only` leaves activations in float and rounds weights to 4 or 8 bits in groups, or to a byte of
floating point. Each layer's sensitivity is measured by itself, or together with those that share its weight; the most
sensitive compute in float until the graph agrees with the float one as closely as the config asks. Their weights are
stored as integers all the same, where the budget allows it: mostly it is the rounding of activations that costs.
Sensitive 4-bit weights take 8 bits first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from onnx import ModelProto

from modelpress import graph
from modelpress.agreement import Judge, from_cosine
from modelpress.checkpoint import Checkpoint
from modelpress.config import QuantizeConfig
from modelpress.errors import ConfigError, CoverageError
from modelpress.progress import Progress, silent
from modelpress.quantize import rewrite, sensitivity, static
from modelpress.quantize.build import builder
from modelpress.quantize.earlier import on_earlier_scales
from modelpress.quantize.frozen import Frozen
from modelpress.quantize.observe import Inputs
from modelpress.quantize.ranges import Observer
from modelpress.quantize.selection import Layer, chosen_layers, eligible_layers, shared_weights
from modelpress.reports import FrozenReport, QuantizeReport, SensitivityRow
from modelpress.workload import Workload

__all__ = ["calibration_batches", "quantize"]

_BATCH = 32
_RANKING_BATCHES, _RANKING_SAMPLES = 3, 8


def quantize(
    checkpoint: Checkpoint,
    workload: Workload,
    config: QuantizeConfig,
    progress: Progress = silent,
    earlier: Checkpoint | None = None,
    observer: Observer | None = None,
) -> tuple[Checkpoint, QuantizeReport]:
    """Quantize an ONNX checkpoint; the checkpoint given is left as it is.

    Calibration and agreement are measured on the workload's calibration split, in batches of 32; the layers are ranked
    on a few samples of it. With `config.scales_from`, the layers take the forms and the scales that they have in the
    `earlier` version, that pack's checkpoint, if the graph agrees about as well with the float one as on fresh scales,
    and within the budget; else the layers are ranked as ever. An `observer` runs the calibration data, for ranges of
    least error, elsewhere (`calibration_batches` says which batches).

    Returns:
        The quantized checkpoint, and what was done: coverage counts the weights whose float form is gone.

    Raises:
        ConfigError: a pattern in `targets` or `ignore` matches nothing, a method that needs the torch module, or
            `scales_from` without an earlier version of this model.
        CoverageError: nothing to quantize, an activation without a calibrated range, or less than `min_coverage` or
            no layer in integers within `max_quality_drop`.
        CorruptionError: no ONNX checkpoint.
        StageError: a node that has no integer form, or nodes that need the weight they share in two forms.
    """
    if config.needs_module:
        raise ConfigError(
            f"quantizing a graph ({config.method})",
            found="no torch module",
            expected="'dynamic', 'static' or 'weight-only', without quantize.recovery",
            fix="call modelpress.quantize.from_module.quantize_module with the module that the graph comes from",
        )
    if (earlier is None) != (config.scales_from is None):
        raise ConfigError(
            "quantizing a graph on the scales of an earlier version",
            found="no earlier version" if earlier is None else "no quantize.scales_from",
            expected="both: quantize.scales_from, and that pack's checkpoint",
        )
    model = graph.join(checkpoint)
    if config.method == "static":
        progress(0, 1, "preparing the graph")
        model = static.prepare(model)
    rewrite.name_nodes_(model)
    layers = eligible_layers(model, config.embeddings)
    chosen = chosen_layers(layers, config)
    batches = calibration_batches(workload)
    build = builder(model, chosen, batches, config, progress, observer=observer)
    frozen = None
    if earlier is not None:
        found, frozen = on_earlier_scales(model, chosen, batches, config, build, Frozen(earlier), progress)
        if found is not None:
            return _finished(checkpoint, found, layers, [], frozen, config)

    units = shared_weights(chosen)
    total = len(units) + 1
    ranked = sensitivity.rank(
        build,
        units,
        Judge(graph.split(model), _some(batches), from_cosine),
        lambda done, node: progress(done - 1, total, f"sensitivity of {node}"),
    )
    kept, quantized, disagreement = _within_budget(build, model, ranked, batches, config, progress)
    rows = [
        SensitivityRow(node=node, disagreement=drop, kept_float=place < kept)
        for place, (unit, drop) in enumerate(ranked)
        for node in unit
    ]
    finished = _finished(checkpoint, (quantized, disagreement), layers, rows, frozen, config)
    progress(total, total, f"coverage {finished[1].coverage:.1%}, agreement {finished[1].agreement:.4f}")
    return finished


def calibration_batches(workload: Workload) -> list[Inputs]:
    """What graphs are calibrated on, in order."""
    return [batch.inputs for batch in workload.batches("calibration", min(_BATCH, workload.evaluation_batch_size))]


def _finished(
    checkpoint: Checkpoint,
    found: tuple[ModelProto, float],
    layers: Sequence[Layer],
    sensitivity: list[SensitivityRow],
    frozen: FrozenReport | None,
    config: QuantizeConfig,
) -> tuple[Checkpoint, QuantizeReport]:
    """The quantized checkpoint and its report, from the model and its disagreement."""
    made = graph.split(found[0])
    still_float = {one.name for one in graph.parse(made).graph.initializer}
    eligible = _elements(layers)
    integers = eligible - _elements(layer for layer in layers if layer.weight in still_float)
    report = QuantizeReport(
        method=_method(config),
        eligible_weights=eligible,
        quantized_weights=integers,
        coverage=integers / eligible,
        agreement=1.0 - found[1],
        sensitivity=sensitivity,
        frozen=frozen,
    )
    _check_coverage(report, config)
    return Checkpoint("onnx", made.tensors, checkpoint.files | made.files, checkpoint.metadata), report


def _within_budget(
    build: sensitivity.Build,
    model: ModelProto,
    ranked: Sequence[tuple[sensitivity.Unit, float]],
    batches: Sequence[Inputs],
    config: QuantizeConfig,
    progress: Progress,
) -> tuple[int, ModelProto, float]:
    """Units in float, the model and its disagreement; float layers have integer weights if that fits the budget."""
    judge = Judge(graph.split(model), batches, from_cosine)
    units = [unit for unit, _ in ranked]

    def note(kept: int, disagreement: float) -> None:
        in_float = sum(len(unit) for unit in units[:kept])
        progress(len(units), len(units) + 1, f"{in_float} layers in float: disagreement {disagreement:.4f}")

    found = sensitivity.keep_in_float(build, units, judge, config.max_quality_drop, note)
    if found[2] <= config.max_quality_drop:
        return found
    return sensitivity.keep_in_float(lambda some, _: build(some, []), units, judge, config.max_quality_drop, note)


def _some(batches: Sequence[Inputs]) -> list[Inputs]:
    """A few samples of a few batches from the whole split, as a split may be in some order."""
    places = {len(batches) * part // _RANKING_BATCHES for part in range(_RANKING_BATCHES)}
    return [{name: tensor[:_RANKING_SAMPLES] for name, tensor in batches[place].items()} for place in sorted(places)]


def _method(config: QuantizeConfig) -> str:
    if config.method == "weight-only":
        return weight_only_method(config)
    if config.method == "dynamic":
        return config.method
    return f"static-{config.calibration}" + ("-power-of-two" if config.powers_of_two else "")


def weight_only_method(config: QuantizeConfig) -> str:
    """Name of what `weight-only` does, for reports."""
    return "weight-only-fp8" if config.algorithm == "fp8" else f"weight-only-{config.algorithm}-int{config.num_bits}"


def _elements(layers: Iterable[Layer]) -> int:
    """Weights of the layers; one that several nodes share counts once."""
    return sum({layer.weight: layer.elements for layer in layers}.values())


def _check_coverage(report: QuantizeReport, config: QuantizeConfig) -> None:
    kept = [row.node for row in report.sensitivity if row.kept_float]
    within_budget = 1.0 - report.agreement <= config.max_quality_drop
    frozen = report.frozen is not None and report.frozen.chosen
    some = frozen or config.method == "weight-only" or len(kept) < len(report.sensitivity)
    if within_budget and report.coverage >= config.min_coverage and some:
        return
    more = "8 bits" if config.method == "weight-only" and config.num_bits < 8 else "float"
    raise CoverageError(
        "quantizing the graph",
        found=f"{report.quantized_weights} of {report.eligible_weights} eligible weights as integers "
        f"({report.coverage:.1%}), agreement {report.agreement:.4f}, {len(kept)} of {len(report.sensitivity)} "
        f"layers in {more}: {', '.join(kept) or 'none'}",
        expected=f"at least quantize.min_coverage, {config.min_coverage:.1%}, and one layer in integers, within "
        f"quantize.max_quality_drop, {config.max_quality_drop}",
        fix="another method or calibration, a wider quantize.max_quality_drop, or a smaller quantize.min_coverage",
    )
