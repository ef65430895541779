"""The picture of a partition: what each block costs, and where the model is cut. Drawn without a display."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from modelpress.reports import PartitionReport

COLOURS = ("#2f5d8a", "#c8752d", "#4f8a5b", "#8a4f7d", "#5f9ea0", "#b0a160")


def draw(report: PartitionReport, path: Path) -> None:
    """Write the picture; the name's ending says how (.svg, .png, .pdf)."""
    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(3, 1, sharex=True)
    numbers = range(len(report.block_bytes))
    parts = [_part(report, number) for number in numbers]
    kinds = (
        ("bytes", "MB", [size / 1e6 for size in report.block_bytes]),
        ("flops", "MFLOP", [count / 1e6 for count in report.block_flops]),
        ("seconds", "ms", [seconds * 1e3 for seconds in report.block_seconds]),
    )
    for axes, (kind, unit, heights) in zip(rows, kinds, strict=True):
        axes.bar(numbers, heights, color=[COLOURS[part % len(COLOURS)] for part in parts])
        for bound in report.bounds[1:-1]:
            axes.axvline(bound - 0.5, color="#b3261e", linestyle="--", linewidth=1)
        axes.set_ylabel(f"{unit} (balanced)" if kind == report.by else unit)
        axes.spines[["top", "right"]].set_visible(False)
    rows[0].set_title(
        f"{len(report.parts)} parts by {report.by}: the dearest is {report.imbalance:.3f} × the mean "
        f"({report.equal_counts_imbalance:.3f} with equally many blocks)",
        fontsize=10,
    )
    rows[-1].set_xlabel("block; what runs before the first and after the last one is counted with these")
    # Text as text, without a date, and with ids that do not change: the same report is the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "partition"}):
        figure.savefig(path, dpi=100, metadata={"Date": None} if path.suffix == ".svg" else None)


def _part(report: PartitionReport, block: int) -> int:
    return next(part for part in range(len(report.parts)) if block < report.bounds[part + 1])
