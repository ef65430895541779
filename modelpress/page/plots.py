"""The kinds of plots that pages have. Labels stand at the left, so that names have room on a phone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from modelpress.page.svg import CHOSEN, GRID, INK, MUTED, SERIES, plot
from modelpress.page.words import short

ROW = 0.27
"""Inches of a row of labels."""
MARKS = ("o", "s", "^", "D", "v", "P")
NAMED = 21
"""Letters of a name in a legend, of which two stand beside each other."""
CROWD = 24
"""Points of a line from which on they have no marks."""


@dataclass(frozen=True)
class Dot:
    """One measured value, and its interval where it has one."""

    row: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Spot:
    """A point of a scatter."""

    x: float
    y: float
    label: str = ""


def dots(
    key: str,
    alt: str,
    rows: Sequence[str],
    series: Mapping[str, Sequence[Dot]],
    *,
    unit: str,
    log: bool = False,
    line: tuple[float, str] | None = None,
    apart: bool = True,
) -> Markup:
    """Values with intervals, a row per name and a colour per series.

    Args:
        key: of the figure.
        alt: what it shows.
        rows: names from top to bottom.
        series: dots by the series' name; a row may have none.
        unit: of the axis.
        log: logarithmic; values that are not positive are left out.
        line: a value to compare with, and what it is.
        apart: whether the series of one row stand under each other; not where each row has one.
    """
    place = {row: number for number, row in enumerate(rows)}
    step = 0.62 / max(1, len(series)) if apart else 0.0

    def paint(axes: Axes) -> None:
        for number, (name, found) in enumerate(series.items()):
            shown = [one for one in found if not log or one.value > 0]
            if not shown:
                continue
            shift = step * (number - (len(series) - 1) / 2)
            below = [one.value - (one.value if one.low is None else min(one.low, one.value)) for one in shown]
            above = [(one.value if one.high is None else max(one.high, one.value)) - one.value for one in shown]
            axes.errorbar(
                [one.value for one in shown],
                [place[one.row] + shift for one in shown],
                xerr=[below, above],
                fmt=MARKS[number % len(MARKS)],
                markersize=4.5,
                capsize=2.5,
                elinewidth=1.3,
                color=SERIES[number % len(SERIES)],
                label=short(name, NAMED),
            )
        if line is not None:
            axes.axvline(line[0], color=MUTED, linewidth=0.9, linestyle="--", label=short(line[1], NAMED))
        _rows(axes, rows)
        _scale(axes, "x", log=log)
        axes.set_xlabel(short(unit, 44))
        _legend(axes, len(series) + (line is not None))

    legend = ROW * 0.8 * ((len(series) + (line is not None) + 1) // 2) if len(series) + (line is not None) > 1 else 0
    return plot(key, alt, paint, height=ROW * len(rows) * (1 + 0.3 * (len(series) > 2)) + 0.75 + legend)


def waterfall(key: str, alt: str, steps: Sequence[tuple[str, float]], told: Callable[[float], str]) -> Markup:
    """What each step takes away: a bar from the value before to the value after; the first and the last are whole."""

    def paint(axes: Axes) -> None:
        most = max(value for _, value in steps) or 1.0
        before = 0.0
        for number, (_, value) in enumerate(steps):
            whole = number in (0, len(steps) - 1)
            left, right = (0.0, value) if whole else sorted((before, value))
            colour = SERIES[0] if whole else SERIES[2] if value <= before else SERIES[1]
            axes.barh(number, max(right - left, most * 0.004), left=left, height=0.62, color=colour)
            text = told(value) if whole else f"{'−' if value <= before else '+'}{told(abs(value - before))}"
            end = max(right, left + most * 0.004)
            axes.annotate(text, (end, number), (4, 0), textcoords="offset points", va="center", fontsize=9)
            if number:
                axes.plot(
                    [before, before],
                    [number - 0.69, number - 0.31 if whole else number + 0.31],
                    color=MUTED,
                    linewidth=0.7,
                )
            before = value
        _rows(axes, [name for name, _ in steps])
        axes.set_xlim(0, most * 1.28)
        axes.xaxis.set_major_formatter(EngFormatter("B"))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel("bytes")

    return plot(key, alt, paint, height=ROW * 1.15 * len(steps) + 0.8)


def scatter(
    key: str,
    alt: str,
    series: Mapping[str, Sequence[Spot]],
    chosen: tuple[str, Spot] | None,
    *,
    axes_named: tuple[str, str],
    logs: tuple[bool, bool] = (False, False),
    joined: frozenset[str] = frozenset(),
    limit: tuple[float, str] | None = None,
) -> Markup:
    """Points of two values; the chosen one is a star. Series in `joined` are lines; `limit` is a height."""

    def paint(axes: Axes) -> None:
        for number, (name, found) in enumerate(series.items()):
            shown = sorted((one for one in found if _fits(one, logs)), key=lambda one: (one.x, one.y))
            if not shown:
                continue
            mark = "" if name in joined and len(shown) > CROWD else MARKS[number % len(MARKS)]
            form = ("-" if name in joined else "") + mark
            xs, ys = [one.x for one in shown], [one.y for one in shown]
            axes.plot(xs, ys, form, color=SERIES[number % len(SERIES)], markersize=5, label=short(name, NAMED))
            _label(axes, [one for one in shown if one.label])
        if chosen is not None and _fits(chosen[1], logs):
            spot = chosen[1]
            axes.plot([spot.x], [spot.y], "*", color=CHOSEN, markersize=13, label=short(chosen[0], NAMED))
        if limit is not None:
            axes.axhline(limit[0], color=MUTED, linewidth=0.9, linestyle="--", label=short(limit[1], NAMED))
        axes.set_xlabel(short(axes_named[0], 44))
        axes.set_ylabel(short(axes_named[1], 34))
        axes.margins(0.12)
        _scale(axes, "x", log=logs[0])
        _scale(axes, "y", log=logs[1])
        axes.tick_params(axis="y", labelcolor=MUTED, labelsize=9)
        axes.grid(visible=True, axis="both")
        axes.set_axisbelow(True)
        _legend(axes, len(series) + (chosen is not None) + (limit is not None))

    return plot(key, alt, paint, height=3.4)


def grids(key: str, alt: str, pair: Sequence[tuple[str, Sequence[Sequence[float]]]]) -> Markup:
    """Two grids of values from −1 to 1 side by side: the stronger, the darker; what speaks against is in the second
    colour, and crossed."""

    def paint(axes: Axes) -> None:
        left, boxes, crosses = 0.0, list[Rectangle](), list[list[tuple[float, float]]]()
        for title, grid in pair:
            columns = max(len(row) for row in grid)
            axes.text(left + columns / 2, -0.5, short(title, 22), ha="center", va="bottom", fontsize=10)
            for y, row in enumerate(grid):
                for x, value in enumerate(row):
                    strength = min(1.0, abs(value))
                    boxes.append(_box((left + x, y), SERIES[0] if value >= 0 else SERIES[1], strength))
                    if value < 0 and strength > 0.3:
                        crosses.append([(left + x + 0.3, y + 0.3), (left + x + 0.7, y + 0.7)])
            left += columns + 1.0
        axes.add_collection(PatchCollection(boxes, match_original=True))
        axes.add_collection(LineCollection(crosses, colors=INK, linewidths=0.6))
        axes.set_xlim(-0.05, left - 0.95)
        axes.set_ylim(max(len(grid) for _, grid in pair) + 0.05, -1.6)
        axes.set_aspect("equal")
        axes.set_axis_off()

    return plot(key, alt, paint, height=2.6)


def _box(corner: tuple[float, float], colour: str, strength: float) -> Rectangle:
    return Rectangle(corner, 1.0, 1.0, facecolor=to_rgba(colour, strength), edgecolor=GRID, linewidth=0.5)


def _label(axes: Axes, spots: Sequence[Spot]) -> None:
    """Names beside points, by turns above and below, and to the left of the last one, which may be at the edge."""
    for number, one in enumerate(spots):
        is_last = number == len(spots) - 1 > 0
        away = (-4 if is_last else 4, 4 if number % 2 == 0 else -11)
        side = "right" if is_last else "left"
        axes.annotate(short(one.label, 18), (one.x, one.y), away, textcoords="offset points", fontsize=9, ha=side)


def _fits(spot: Spot, logs: tuple[bool, bool]) -> bool:
    return (spot.x > 0 or not logs[0]) and (spot.y > 0 or not logs[1])


def _rows(axes: Axes, rows: Sequence[str]) -> None:
    axes.set_yticks(range(len(rows)), [short(row, 22) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=True, axis="x")
    axes.set_axisbelow(True)


def _scale(axes: Axes, which: Literal["x", "y"], *, log: bool) -> None:
    """Ticks as plain text: what matplotlib writes by itself on logarithmic axes are formulas."""
    axis, limits = (axes.xaxis, axes.get_xlim) if which == "x" else (axes.yaxis, axes.get_ylim)
    if not log:
        axis.set_major_locator(MaxNLocator(4 if which == "x" else 5))
        if max(map(abs, limits())) >= 1e5:
            axis.set_major_formatter(EngFormatter(sep=""))
        elif max(map(abs, limits())) < 1e-3:
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1e}".replace("-", "−")))
        return
    axes.set(**{f"{which}scale": "log"})
    low, high = limits()
    if low > 0 and high / low < 30:  # less than two powers of ten: name what lies between them
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_formatter(NullFormatter())


def _plain(value: float, _position: int | None = None) -> str:
    """`0.5`, `20`, `3k`, `1e−07`."""
    if value >= 1e4:
        return str(EngFormatter(sep="")(value))
    return f"{value:g}" if value >= 1e-3 else f"{value:.0e}".replace("-", "−")


def _legend(axes: Axes, entries: int) -> None:
    if entries > 1:
        handles, labels = axes.get_legend_handles_labels()
        axes.figure.legend(handles, labels, loc="outside upper left", ncols=2, borderaxespad=0.2, handletextpad=0.4)
