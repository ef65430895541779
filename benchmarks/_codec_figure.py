"""`docs/img/codecs.svg`: ratio against decode rate, for a dense case and a sparse one.

`python -m benchmarks._codec_figure ROWS.json [SVG]` draws it from the rows that a benchmark kept with `--json`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from benchmarks._report import Row

PANELS = ("encoder bf16", "encoder int8, 90 % zeros")
OURS, PEER, COPY = "#c8752d", "#2f5d8a", "#999999"
FONT_SIZE = 8.5
RADII = (7, 9, 12, 16, 20, 25, 30, 36, 43, 50, 60, 70)
ANGLES = tuple(range(0, 360, 15))
"""Where a label may stand: points from its dot, tried from near to far."""
FAR, CROWDED, SAME = 10, 30, 4
"""Points: a label that is further gets a line; a label that is further may be nearer to another dot; one place."""
Spot = tuple[float, float]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the picture as SVG; what was not measured is left out."""
    with rc_context({"svg.hashsalt": "codecs", "svg.fonttype": "path"}):
        figure = Figure(figsize=(12.0, 6.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(1, 2)
        for one, case in zip(axes, PANELS, strict=True):
            _panel(one, case, [row for row in rows if row.case == case])
        # Labels are placed in pixels: the layout has to be settled first.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for one in axes:
            _label(one)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _panel(axes: Axes, case: str, rows: Sequence[Row]) -> None:
    values = {(row.system, row.metric): row.value for row in rows}
    for system in dict.fromkeys(row.system for row in rows):
        ratio, decode = values.get((system, "ratio")), values.get((system, "decode"))
        if ratio is not None and decode is not None:
            ours = system == "modelpress"
            axes.plot(decode, ratio, "D" if ours else "o", color=OURS if ours else PEER, label=system, zorder=3 + ours)
    bound, copy = values.get(("order-0 bound", "ratio")), values.get(("memcpy", "decode"))
    if bound is not None:
        axes.axhline(bound, color=COPY, linewidth=1, linestyle=":", zorder=1)
        axes.annotate("order-0 bound", (0.0, bound), (4, 3), xycoords=("axes fraction", "data"),
                      textcoords="offset points", fontsize=FONT_SIZE, color=COPY)  # fmt: skip
    axes.set_xscale("log")
    if copy is not None:
        axes.axvline(copy, color=COPY, linewidth=1, linestyle="--", zorder=1)
        axes.annotate("memcpy", (copy, 0.02), (-4, 0), xycoords=("data", "axes fraction"),
                      textcoords="offset points", fontsize=FONT_SIZE, color=COPY, ha="right")  # fmt: skip
    axes.margins(x=0.12, y=0.14)
    axes.set_title(case, loc="left")
    axes.set_xlabel("decode, GB/s of weights, one core")
    axes.set_ylabel("ratio: original ÷ stored bytes")
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _label(axes: Axes) -> None:
    """Name every dot, each label at the nearest place where it meets no dot, no other label and no edge."""
    scale = axes.figure.dpi / 72
    dots = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    spots: list[Spot] = [(float(x), float(y)) for x, y in axes.transData.transform([_at(line) for line in dots])]
    taken = [Bbox.from_bounds(x - 5 * scale, y - 5 * scale, 10 * scale, 10 * scale) for x, y in spots]
    taken += [text.get_window_extent() for text in axes.texts]
    taken += [
        line.get_window_extent().padded(1) for line in axes.lines if line not in dots and line.get_linestyle() == "--"
    ]
    # The crowd is to the right: it chooses first.
    for line, (x, y) in sorted(zip(dots, spots, strict=True), key=lambda one: -one[1][0]):
        text = axes.annotate(str(line.get_label()), _at(line), (0, 0), textcoords="offset points", fontsize=FONT_SIZE,
                             fontweight="bold" if line.get_label() == "modelpress" else "normal",
                             color=line.get_color())  # fmt: skip
        size = text.get_window_extent()
        box = _place(axes, (x, y), (size.width, size.height), taken, spots)
        taken.append(box)
        text.set_position(((box.x0 - size.x0) / scale, (box.y0 - size.y0) / scale))
        if _gap(box, (x, y)) > FAR * scale:
            axes.annotate("", _at(line), _nearest(box, (x, y)), xycoords="data", textcoords="figure pixels",
                          arrowprops={"arrowstyle": "-", "color": COPY, "linewidth": 0.7, "shrinkB": 3})  # fmt: skip


def _place(axes: Axes, spot: Spot, size: Spot, taken: Sequence[Bbox], spots: Sequence[Spot]) -> Bbox:
    """Where a label of this size stands best, in pixels: free, and nearer to its own dot than to any other."""
    scale, frame, (x, y), (width, height) = axes.figure.dpi / 72, axes.get_window_extent(), spot, size
    box, spare = Bbox.from_bounds(x, y, width, height), None
    for radius in RADII:
        for angle in map(math.radians, ANGLES):
            # The side of the label that looks at the dot is at the offset.
            left = x + radius * scale * math.cos(angle) - width * (1 - math.cos(angle)) / 2
            low = y + radius * scale * math.sin(angle) - height * (1 - math.sin(angle)) / 2
            box = Bbox.from_bounds(left, low, width, height)
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
            # Two dots at nearly one place share what is near to them.
            others = [other for other in spots if math.dist(other, spot) > SAME * scale]
            clear = all(_gap(box, other) > 1.3 * _gap(box, spot) for other in others)
            clear |= radius >= CROWDED and not any(_is_on_way(spot, box, other, 3 * scale) for other in others)
            if not inside or any(box.overlaps(other) for other in taken):
                continue
            if clear:
                return box
            spare = spare or box
    return spare or box


def _nearest(box: Bbox, spot: Spot) -> Spot:
    return min(max(spot[0], box.x0), box.x1), min(max(spot[1], box.y0), box.y1)


def _gap(box: Bbox, spot: Spot) -> float:
    """Distance from a point to a box, in pixels."""
    return math.dist(_nearest(box, spot), spot)


def _is_on_way(spot: Spot, box: Bbox, other: Spot, width: float) -> bool:
    """Whether the line from a dot to its label would touch another dot."""
    begin = complex(*spot)
    line, to_other = complex(*_nearest(box, spot)) - begin, complex(*other) - begin
    along = min(max((to_other * line.conjugate()).real / abs(line) ** 2, 0.0), 1.0)
    return abs(to_other - along * line) < width


def _at(line: Line2D) -> tuple[float, float]:
    ((x, y),) = np.asarray(line.get_xydata(), float).tolist()
    return x, y


if __name__ == "__main__":
    kept = [Row(**row) for row in json.loads(Path(sys.argv[1]).read_text())]
    draw(kept, Path(sys.argv[2]) if len(sys.argv) > 2 else Path("docs/img/codecs.svg"))
