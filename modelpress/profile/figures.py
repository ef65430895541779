"""The plots of a profile: roofline, latency, memory. Drawn without a display, readable on light and on dark paper.

The paper is transparent, and every colour has enough contrast with white and with black: text and axes are a grey in
the middle between both, marks differ in shape as well as in colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from modelpress.profile.roofline import matrix_rate
from modelpress.reports.measured import value_of
from modelpress.reports.profile import OperatorProfile, ProfileReport

INK = "#808080"
"""Text and axes: a contrast of 4 with white, of 5 with black."""
COLOURS = {"compute": "#2f81c4", "memory": "#c8752d", "latency": "#8f6bc0"}
MARKS = {"compute": "o", "memory": "s", "latency": "^"}
_LINES = ("#2f81c4", "#c8752d", "#3f9a5f", "#8f6bc0", "#c2557a", "#7d8c2f")
Point = tuple[OperatorProfile, float, float, float]
"""An operator, its operations per byte, its operations per second, its share of the time."""


def draw(report: ProfileReport, folder: Path) -> list[Path]:
    """Write what the report has numbers for, as PNG: `roofline`, `latency`, `memory`; the files that were written."""
    written = []
    for name, plot in (("roofline", _roofline), ("latency", _latency), ("memory", _memory)):
        figure = Figure(figsize=(8.0, 5.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        if plot(report, axes):
            _style(axes)
            if axes.get_legend_handles_labels()[1]:
                figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False, labelcolor=INK)
            figure.patch.set_alpha(0.0)
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=110, transparent=True)
            written.append(path)
    return written


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(INK)
    axes.tick_params(colors=INK, which="both")
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_color(INK)
    axes.grid(visible=True, which="major", color=INK, alpha=0.25, linewidth=0.6)


def _roofline(report: ProfileReport, axes: Axes) -> bool:
    """Operations per second against operations per byte, under the measured ceilings."""
    bandwidth = value_of(report.machine.copy_bytes_per_second)
    points = [point for one in report.operators if (point := _point(one)) is not None]
    if bandwidth is None or not points:
        return False
    at = [intensity for _, intensity, _, _ in points]
    low, high = min(at) / 3, max(*at, 100.0) * 3
    grid = np.geomspace(low, high, 200)
    for style, dtype in zip(("-", "--", "-.", ":"), _dtypes(report), strict=False):
        rate = matrix_rate(report.machine, dtype)
        if rate is not None:
            label = f"{dtype}: {rate / 1e9:.3g} Gop/s, {bandwidth / 1e9:.3g} GB/s"
            axes.plot(grid, np.minimum(rate, bandwidth * grid), style, color=INK, linewidth=1.6, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    rates = [rate for _, _, rate, _ in points]
    axes.set_xlim(low, high)
    axes.set_ylim(min(rates) / 5, max(*rates, bandwidth * low) * 5)
    largest = max(share for *_, share in points)
    for bound, colour in COLOURS.items():
        chosen = [point for point in points if point[0].bound == bound]
        if chosen:
            _scatter(axes, chosen, bound, colour, largest)
    axes.set_xlabel("operations per byte moved")
    axes.set_ylabel("operations per second")
    axes.set_title(f"{report.subject}, batch {report.batch_size}: operators under the measured ceilings", fontsize=10)
    return True


def _scatter(axes: Axes, chosen: Sequence[Point], bound: str, colour: str, largest: float) -> None:
    """Operators of one class, the one that takes most of the time by its name."""
    axes.scatter(
        [x for _, x, _, _ in chosen],
        [y for _, _, y, _ in chosen],
        s=[20 + 300 * share / largest for *_, share in chosen],
        marker=MARKS[bound],
        color=colour,
        alpha=0.6,
        linewidths=0,
    )
    total = sum(share for *_, share in chosen)
    label = f"{bound}: {len(chosen)} operators, {total:.0%} of all operators' time"
    axes.plot([], [], MARKS[bound], color=colour, label=label)  # a mark of its own size in the legend
    one, x, y, share = max(chosen, key=lambda point: point[3])
    place = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))
    right, high = place[0] > 0.5, place[1] > 0.3
    axes.annotate(
        f"{_short(one.name)}, {share:.1%}", (x, y), (-14 if right else 14, -28 if high else 22), color=colour,
        fontsize=8, ha="right" if right else "left", textcoords="offset points",
        arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8},
    )  # fmt: skip


def _point(one: OperatorProfile) -> Point | None:
    """An operator's place; None for one that computes nothing, or whose figures are not all known."""
    intensity, flops, seconds = value_of(one.intensity), value_of(one.flops), value_of(one.seconds)
    if not intensity or not flops or not seconds:
        return None
    return one, intensity, flops / seconds, value_of(one.share) or 0.0


def _dtypes(report: ProfileReport) -> list[str]:
    """The types that products of the model are computed in; float32 where there are none."""
    known = [rate.dtype for rate in report.machine.matrix_rates]
    used = {one.dtype for one in report.operators if value_of(one.flops)}
    return [dtype for dtype in known if dtype in used] or known[:1]


def _short(name: str) -> str:
    return name if len(name) <= 32 else f"…{name[-31:]}"


def _latency(report: ProfileReport, axes: Axes) -> bool:
    """Percentiles of latency: closed loops, and open ones by their utilisation."""
    curves: list[tuple[str, str, Sequence[float]]] = [
        (f"closed loop, batch {row.batch_size}", "-", row.percentiles_seconds) for row in report.latency
    ]
    curves += [
        (f"open loop, {row.utilisation:.0%} of capacity ({row.rate_per_second:,.0f}/s)", "--", row.percentiles_seconds)
        for row in report.load
    ]
    if not curves:
        return False
    for number, (label, line, percentiles) in enumerate(curves):
        colour = _LINES[number % len(_LINES)]
        axes.plot(np.asarray(percentiles) * 1e3, np.arange(101), line, color=colour, linewidth=1.5, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("latency from the intended arrival, ms")
    axes.set_ylabel("percent of requests that are no slower")
    axes.set_title(f"{report.subject}: latency", fontsize=10)
    return True


def _memory(report: ProfileReport, axes: Axes) -> bool:
    """Resident memory over time, with what began when."""
    points = report.memory.timeline
    if len(points) < 2:
        return False
    seconds = [point.seconds for point in points]
    mebibytes = [point.resident_bytes / 2**20 for point in points]
    axes.plot(seconds, mebibytes, color=_LINES[0], linewidth=1.5)
    axes.fill_between(seconds, mebibytes, color=_LINES[0], alpha=0.2)
    top = max(mebibytes)
    end, last, level, levels = max(seconds), -np.inf, 0, 0
    for point in (one for one in points if one.mark):
        axes.axvline(point.seconds, color=INK, linewidth=0.8, linestyle=":")
        # Marks that are close together stand below one another.
        level = level + 1 if point.seconds - last < 0.12 * end else 0
        last, levels = point.seconds, max(levels, level)
        right = point.seconds > 0.8 * end
        axes.annotate(
            point.mark, (point.seconds, 1 - 0.055 * level), (-3 if right else 3, -2), color=INK, fontsize=8, va="top",
            ha="right" if right else "left", xycoords=("data", "axes fraction"), textcoords="offset points",
        )  # fmt: skip
    axes.set_ylim(0, top / (0.94 - 0.055 * levels))
    axes.set_xlim(0, end)
    axes.set_xlabel("seconds since the process began")
    axes.set_ylabel("resident memory, MiB")
    axes.set_title(f"{report.subject}: memory of a new process that loads and runs the model", fontsize=10)
    return True
