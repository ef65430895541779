"""The plots of a run: quality, bytes and throughput per stage, and bytes by codec. Drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flows.result import StageRow
from modelpress.reports import CompressReport

COLOURS = ("#2f5d8a", "#c8752d", "#4f8a5b", "#8a4f7d", "#999999")


def draw(rows: Sequence[StageRow], compressed: CompressReport | None, path: Path) -> None:
    """Write the plots into one PNG."""
    figure = Figure(figsize=(12.0, 7.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2).ravel()
    _quality(axes[0], rows)
    _bytes(axes[1], rows)
    _throughput(axes[2], rows)
    if compressed is not None:
        _codecs(axes[3], compressed)
    for title, one in zip(("quality", "bytes", "throughput", "bytes by codec"), axes, strict=True):
        one.set_title(title, loc="left")
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(axis="x", labelrotation=20)
    axes[3].set_visible(compressed is not None)
    figure.savefig(path, dpi=100)


def _quality(axes: Axes, rows: Sequence[StageRow]) -> None:
    judged = [(row.stage, row.quality) for row in rows if row.quality is not None]
    values = [quality.value for _, quality in judged]
    below = [quality.value - quality.low for _, quality in judged]
    above = [quality.high - quality.value for _, quality in judged]
    axes.errorbar([stage for stage, _ in judged], values, yerr=[below, above], fmt="o", capsize=4, color=COLOURS[0])
    axes.set_ylabel(judged[0][1].metric if judged else "")


def _bytes(axes: Axes, rows: Sequence[StageRow]) -> None:
    sized = [(row.stage, row.size_bytes) for row in rows if row.size_bytes]
    # Points, not bars: on a logarithmic axis the length of a bar says nothing.
    axes.plot([stage for stage, _ in sized], [size for _, size in sized], "o-", color=COLOURS[0])
    for stage, size in sized:
        axes.annotate(f"{size:,}", (stage, size), (0, 6), textcoords="offset points", ha="center", fontsize=7)
    axes.set_yscale("log")
    axes.margins(y=0.15)
    axes.set_ylabel("bytes")


def _throughput(axes: Axes, rows: Sequence[StageRow]) -> None:
    batches = sorted({latency.batch_size for row in rows for latency in row.latency})
    for colour, batch in zip(COLOURS, batches, strict=False):
        found = [
            (row.stage, latency.throughput_per_second)
            for row in rows
            for latency in row.latency
            if latency.batch_size == batch
        ]
        axes.plot(
            [stage for stage, _ in found], [rate for _, rate in found], "o-", color=colour, label=f"batch {batch}"
        )
    axes.set_yscale("log")
    axes.set_ylabel("samples per second")
    axes.legend(frameon=False)


def _codecs(axes: Axes, report: CompressReport) -> None:
    codecs = sorted({tensor.codec for tensor in report.tensors})
    before = [sum(tensor.raw_bytes for tensor in report.tensors if tensor.codec == codec) for codec in codecs]
    after = [sum(tensor.stored_bytes for tensor in report.tensors if tensor.codec == codec) for codec in codecs]
    places = range(len(codecs))
    axes.bar([place - 0.2 for place in places], before, 0.4, color=COLOURS[4], label="raw")
    axes.bar([place + 0.2 for place in places], after, 0.4, color=COLOURS[0], label="stored")
    axes.set_xticks(list(places), codecs)
    axes.set_ylabel("bytes")
    axes.legend(frameon=False)
