"""Layer by layer: what each one suffers from being changed, and how it came out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from modelpress.page import words
from modelpress.page.parts import Figure, Section, Table
from modelpress.page.plots import Dot, dots
from modelpress.page.story import Story
from modelpress.reports import PlanReport, PruneReport, QuantizeReport

SHOWN, LISTED = 20, 150


@dataclass(frozen=True)
class Layer:
    """One layer, node or weight."""

    name: str
    value: float
    """How much it suffers; more is worse."""
    said: str = ""
    kind: str = ""
    """The series that it is shown in."""


@dataclass(frozen=True)
class Measure:
    """One measurement of many layers."""

    key: str
    title: str
    unit: str
    layers: Sequence[Layer]


def section(story: Story) -> Section | None:
    """What was measured of single layers: sensitivity, disagreement within the plan, error of what was pruned."""
    found = [measure for measure in _measures(story) if measure.layers]
    if not found:
        return None
    return Section(
        key="layers",
        title="Layer by layer",
        lead=[
            "Layers are shown from the one that suffers most; those that are not drawn are in the table, or summed up."
        ],
        figures=[_figure(measure) for measure in found],
    )


def _measures(story: Story) -> list[Measure]:
    measures = []
    if quantized := story.report("quantize", QuantizeReport):
        sensitive = [
            Layer(row.node, row.disagreement, became, became)
            for row in quantized.sensitivity
            for became in ["kept in float" if row.kept_float else "quantized"]
        ]
        unit = "disagreement, this layer alone"
        measures.append(Measure("sensitivity", "Sensitivity to quantization, each layer alone", unit, sensitive))
        if quantized.codebook is not None:
            shared = [
                Layer(one.name, one.relative_error, f"{one.values:,} values") for one in quantized.codebook.tensors
            ]
            unit = "relative error of the weights"
            measures.append(Measure("codebook", "Error of weights that share values", unit, shared))
        if quantized.frozen is not None:
            grown = [
                Layer(
                    one.name, one.error_growth, "on earlier scales" if one.frozen else one.reason or "on fresh scales"
                )
                for one in quantized.frozen.weights
                if one.error_growth is not None
            ]
            unit = "error on earlier ÷ on fresh scales"
            measures.append(Measure("frozen", "Rounding error on an earlier version's scales", unit, grown))
    if plan := story.report("plan", PlanReport):
        planned = [
            Layer(one.name, one.disagreement, one.form + ("" if one.is_measured else ", foretold"), "")
            for one in plan.tensors
        ]
        unit = "disagreement, this weight alone"
        measures.append(Measure("planned", "What each weight's form costs, alone", unit, planned))
    if pruned := story.report("prune", PruneReport):
        removed = [
            Layer(one.name, one.output_error, f"{words.shape(one.before)} → {words.shape(one.after)}")
            for one in pruned.tensors
            if one.output_error is not None
        ]
        unit = "squared error of the outputs"
        measures.append(Measure("pruned", "Error of the outputs by pruning, before recovery", unit, removed))
    return measures


def _figure(measure: Measure) -> Figure:
    ordered = sorted(measure.layers, key=lambda layer: (-layer.value, layer.name))
    shown = ordered[:SHOWN]
    series: dict[str, list[Dot]] = defaultdict(list)
    for layer in shown:
        series[layer.kind or measure.unit].append(Dot(layer.name, layer.value))
    key = f"layers-{measure.key}"
    most, least = max(layer.value for layer in shown), min(layer.value for layer in shown)
    rows = [
        [words.cut(layer.name, 160), f"{layer.value:.3e}", words.cut(layer.said, 120)] for layer in ordered[:LISTED]
    ]
    if rest := ordered[LISTED:]:
        mean = sum(layer.value for layer in rest) / len(rest)
        rows.append([f"{len(rest):,} more", f"mean {mean:.1e}", f"at most {rest[0].value:.1e} each"])
    left = len(ordered) - len(shown)
    caption = measure.title + (f"; the {len(shown)} largest of {len(ordered):,}" if left else "")
    alt = f"{measure.title}: from {least:.3g} to {most:.3g}; most in {words.cut(shown[0].name, 80)}"
    log = least > 0 and most / least > 20
    names = list(dict.fromkeys(layer.name for layer in shown))
    return Figure(
        key=key,
        caption=caption,
        svg=dots(key, alt, names, dict(series), unit=measure.unit, log=log, apart=False),
        table=Table(measure.title, ["layer", measure.unit, "what it became"], rows, numbers=frozenset({1})),
    )
