"""The plot of variants: quality by bytes and by latency, with what no other beats. Drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from modelpress.reports import QualityReport, VariantsReport
from modelpress.variants import choose

BLUE, ORANGE, RED, GREY = "#2f5d8a", "#c8752d", "#b3261e", "#999999"


def draw(report: VariantsReport, path: Path) -> None:
    """Write the plot as PNG; variants that came to no end are not on it."""
    ended = {one.number: one for one in report.variants if one.quality is not None}
    sized = {number: float(one.size_bytes) for number, one in ended.items() if one.size_bytes is not None}
    timed = {
        number: 1000 * found.p50_seconds
        for number, one in ended.items()
        if (found := choose.call(one.latency)) is not None
    }
    source = choose.call(report.source_latency)
    quality = {number: one.quality for number, one in ended.items() if one.quality is not None}
    figure = Figure(figsize=(13.0, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(left, report, sized, quality, report.by_bytes, report.source_bytes)
    left.set_xlabel("bytes of graph and coded tensors")
    left.set_xscale("log")
    _panel(right, report, timed, quality, report.by_latency, 1000 * source.p50_seconds if source else None)
    batch = source.batch_size if source else None
    right.set_xlabel(f"ms a call at batch {batch}, alone on the machine" if batch else "latency was not measured")
    metric = next((one.metric for one in quality.values()), "quality")
    left.set_ylabel(metric)
    if quality:
        left.legend(frameon=False)
    figure.savefig(path, dpi=100)


def _panel(
    axes: Axes,
    report: VariantsReport,
    costs: Mapping[int, float],
    quality: Mapping[int, QualityReport],
    front: list[int],
    source: float | None,
) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    if not costs:
        return
    numbers = sorted(costs)
    values = [quality[number].value for number in numbers]
    spans = [
        [quality[number].value - quality[number].low for number in numbers],
        [quality[number].high - quality[number].value for number in numbers],
    ]
    where = [costs[number] for number in numbers]
    axes.errorbar(where, values, yerr=spans, fmt="o", color=BLUE, ecolor=GREY, elinewidth=0.7, label="variants")
    axes.plot(
        [costs[number] for number in front],
        [quality[number].value for number in front],
        "-",
        color=ORANGE,
        label="no other is better in both",
    )
    best = report.best
    if best is not None and best in costs:
        axes.plot([costs[best]], [quality[best].value], "*", color=RED, markersize=14, label="the best")
    for number in front:
        axes.annotate(
            str(number),  # its row in the table says the rest
            (costs[number], quality[number].value),
            (5, 5),
            textcoords="offset points",
            fontsize=9,
        )
    baseline = quality[numbers[0]].baseline
    if source is not None and baseline is not None:
        axes.plot([source], [baseline], "D", color=GREY, label="source model")
