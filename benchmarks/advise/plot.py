"""The plot of the documentation: foretold against measured, of every recipe of every model's grid."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from benchmarks.advise.cases import Kept
from modelpress.reports import Predicted

MEASURED = {"latency_seconds": "median_latency_seconds", "batch_seconds": "median_batch_seconds"}
"""What is foretold as a median is held against one."""
PANELS = {
    "published_bytes": ("bytes of a pack", 1.0),
    "latency_seconds": ("milliseconds of a call, batch 1", 1000.0),
    "batch_seconds": ("milliseconds of a call, larger batch", 1000.0),
}
COLOURS = ("#2f5d8a", "#b3261e", "#4f7942", "#8a6d2f")
MARKS = ("o", "s", "^", "D")


def draw(kept: Mapping[str, Kept], path: Path) -> None:
    """Write the plot as PNG: a panel per number, a point per recipe, its interval as a line."""
    figure = Figure(figsize=(11.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (metric, (title, factor)) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        ends: list[float] = []
        for (model, one), colour, mark in zip(kept.items(), COLOURS, MARKS, strict=False):
            rows = {row.label: row for row in one.rows if not row.failed}
            points = []
            for advised in one.reports[0].ranked:
                told = getattr(advised.outlook, metric) if advised.outlook else None
                if isinstance(told, Predicted) and advised.label in rows:
                    points.append((told, factor * getattr(rows[advised.label], MEASURED.get(metric, metric))))
            if not points:
                continue
            values = [factor * told.value for told, _ in points]
            below = [factor * (told.value - told.low) for told, _ in points]
            above = [factor * (told.high - told.value) for told, _ in points]
            measured = [value for _, value in points]
            axes.errorbar(
                measured, values, yerr=[below, above], fmt=mark, color=colour, markersize=4, linewidth=0.7, label=model
            )
            ends += [*measured, *values]
        if ends:
            low, high = 0.8 * min(ends), 1.25 * max(ends)
            axes.plot([low, high], [low, high], color="#999999", linewidth=0.8, linestyle="--")
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator())
            axis.set_major_formatter(
                EngFormatter(sep="") if factor == 1 else FuncFormatter(lambda value, _: f"{value:g}")
            )
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("measured")
        axes.set_ylabel("foretold")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
