"""The plot of a plan: coded bytes against disagreement, with the uniform settings. Drawn without a display."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from modelpress.reports import PlanPoint, PlanReport

COLOURS = ("#c8752d", "#4f8a5b", "#8a4f7d", "#999999")
MARKS = ("s", "^", "D", "v")


def draw(report: PlanReport, path: Path) -> None:
    """Write the plot as PNG."""
    figure = Figure(figsize=(8.0, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    front = [point for point in report.front if point.disagreement > 0]
    axes.plot(*_columns(front), "o-", color="#2f5d8a", label="planned")
    # The label of a uniform setting is "5 bits, scale per channel".
    by_scale = sorted(report.uniform, key=lambda point: point.label.partition(", ")[2])
    for place, (scale, points) in enumerate(groupby(by_scale, key=lambda point: point.label.partition(", ")[2])):
        colour, mark = COLOURS[place % len(COLOURS)], MARKS[place % len(MARKS)]
        axes.plot(*_columns(list(points)), mark, color=colour, label=f"uniform, {scale}")
    axes.plot([report.coded_bytes], [report.disagreement], "*", color="#b3261e", markersize=14, label="the plan")
    axes.axhline(report.max_disagreement, color="#999999", linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("coded bytes")
    meaning = "mean KL divergence, nats" if report.divergence == "kl" else "1 − mean cosine"
    axes.set_ylabel(f"disagreement with the float graph ({meaning})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=100)


def _columns(points: list[PlanPoint]) -> tuple[list[int], list[float]]:
    shown = sorted((point.coded_bytes, point.disagreement) for point in points if point.disagreement > 0)
    return [size for size, _ in shown], [error for _, error in shown]
