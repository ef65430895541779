"""The plot of a plan: bytes or seconds against disagreement, with the uniform settings. Drawn without a display."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from modelpress.reports import PlanPoint, PlanReport

COLOURS = ("#c8752d", "#4f8a5b", "#8a4f7d", "#5f9ea0", "#b0a160", "#999999")
MARKS = ("s", "^", "D", "v", "P", "X")


def draw(report: PlanReport, path: Path) -> None:
    """Write the plot as PNG."""
    figure = Figure(figsize=(8.0, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    front = [point for point in report.front if point.disagreement > 0]
    axes.plot(*_columns(front), "o-", color="#2f5d8a", label="planned")
    for place, (kind, points) in enumerate(groupby(sorted(report.uniform, key=_kind), key=_kind)):
        colour, mark = COLOURS[place % len(COLOURS)], MARKS[place % len(MARKS)]
        axes.plot(*_columns(list(points)), mark, color=colour, label=f"uniform, {kind}")
    axes.plot(
        [report.coded_bytes if report.seconds is None else report.seconds],
        [report.disagreement],
        "*",
        color="#b3261e",
        markersize=14,
        label="the plan",
    )
    axes.axhline(report.max_disagreement, color="#999999", linewidth=0.8, linestyle="--")
    axes.set_xscale("log" if report.seconds is None else "linear")
    axes.set_yscale("log")
    axes.set_xlabel("coded bytes" if report.seconds is None else "seconds of a call")
    meaning = "mean KL divergence, nats" if report.divergence == "kl" else "1 − mean cosine"
    axes.set_ylabel(f"disagreement with the float graph ({meaning})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=100)


def _kind(point: PlanPoint) -> str:
    """What a uniform setting shares with others: of "5 bits, scale per channel" all but the bits; of a kernel, all."""
    return point.label.partition(", ")[2] if point.seconds is None else point.label


def _columns(points: list[PlanPoint]) -> tuple[list[float], list[float]]:
    costs = [point.coded_bytes if point.seconds is None else point.seconds for point in points]
    pairs = sorted((cost, point.disagreement) for cost, point in zip(costs, points, strict=True))
    shown = [(cost, error) for cost, error in pairs if error > 0]
    return [cost for cost, _ in shown], [error for _, error in shown]
