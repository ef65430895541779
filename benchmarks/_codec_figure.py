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
RADII = (7, 13, 20, 28, 37, 47, 58, 70)
ANGLES = tuple(range(0, 360, 15))
"""Where a label may stand: points from its dot, tried from near to far."""


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the picture as SVG; what was not measured is left out."""
    with rc_context({"svg.hashsalt": "codecs", "svg.fonttype": "path"}):
        figure = Figure(figsize=(12.0, 5.4), layout="constrained")
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
            axes.plot(decode, ratio, "D" if ours else "o", color=OURS if ours else PEER, label=system, zorder=3)
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
    spots = [axes.transData.transform(_at(line)) for line in dots]
    frame = axes.get_window_extent()
    taken = [Bbox.from_extents(x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale) for x, y in spots]
    taken += [text.get_window_extent() for text in axes.texts]
    taken += [line.get_window_extent().padded(1) for line in axes.lines if line not in dots]
    for line, (x, y) in sorted(zip(dots, spots, strict=True), key=lambda one: -one[1][0]):
        text = axes.annotate(str(line.get_label()), (x, y), (0, 0), xycoords="figure pixels",
                             textcoords="offset points", fontsize=FONT_SIZE, color=line.get_color())  # fmt: skip
        size = text.get_window_extent()
        for radius in RADII:
            for angle in ANGLES:
                dx, dy = radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))
                # The side of the label that looks at the dot is at the offset.
                left = x + dx * scale - size.width * (1 - math.cos(math.radians(angle))) / 2
                low = y + dy * scale - size.height * (1 - math.sin(math.radians(angle))) / 2
                box = Bbox.from_bounds(left, low, size.width, size.height)
                inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
                if inside and not any(box.overlaps(other) for other in taken):
                    break
            else:
                continue
            break
        taken.append(box)
        text.remove()
        far = radius > RADII[1]
        axes.annotate(
            str(line.get_label()),
            _at(line),
            ((left - x) / scale, (low - y) / scale + 2),
            textcoords="offset points",
            fontsize=FONT_SIZE,
            color=line.get_color(),
            fontweight="bold" if line.get_label() == "modelpress" else "normal",
            arrowprops={"arrowstyle": "-", "color": COPY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
            if far
            else None,
        )


def _at(line: Line2D) -> tuple[float, float]:
    ((x, y),) = np.asarray(line.get_xydata(), float).tolist()
    return x, y


if __name__ == "__main__":
    kept = [Row(**row) for row in json.loads(Path(sys.argv[1]).read_text())]
    draw(kept, Path(sys.argv[2]) if len(sys.argv) > 2 else Path("docs/img/codecs.svg"))
