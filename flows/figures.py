"""The plots of a run: quality, bytes, latency, throughput and time per stage, and bytes by codec. Drawn without a
display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flows.result import StageRow
from modelpress.reports import CompressReport

DPI = 80
COLOURS = ("#2f5d8a", "#c8752d", "#4f8a5b", "#8a4f7d", "#999999")


def draw(rows: Sequence[StageRow], compressed: CompressReport | None, path: Path) -> None:
    """Write the plots into one PNG."""
    figure = Figure(figsize=(16.0, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3).ravel()
    _quality(axes[0], rows)
    _bytes(axes[1], rows)
    _latency(axes[2], rows)
    _throughput(axes[3], rows)
    _seconds(axes[4], rows)
    if compressed is not None:
        _codecs(axes[5], compressed)
    titles = ("quality", "bytes", "latency, p50 to p99", "throughput", "time taken", "bytes by codec")
    for title, one in zip(titles, axes, strict=True):
        one.set_title(title, loc="left")
        one.spines[["top", "right"]].set_visible(False)
        for label in one.get_xticklabels():
            label.set(rotation=30, ha="right", rotation_mode="anchor")
    axes[5].set_visible(compressed is not None)
    figure.savefig(path, dpi=DPI)


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
        axes.annotate(_short(size), (stage, size), (0, 6), textcoords="offset points", ha="center", fontsize=7)
    axes.set_yscale("log")
    axes.margins(y=0.15)
    axes.set_ylabel("bytes")


def _short(size: int) -> str:
    """Three digits at most, in decimal units; the table has the bytes."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size} B"


def _latency(axes: Axes, rows: Sequence[StageRow]) -> None:
    """Per call, by batch size; beside each other, since the batches' times may lie close."""
    measured = [row for row in rows if row.latency]
    batches = _batches(rows)
    for number, (colour, batch) in enumerate(zip(COLOURS, batches, strict=False)):
        found = [(place, one) for place, row in enumerate(measured) for one in row.latency if one.batch_size == batch]
        shift = 0.15 * (number - (len(batches) - 1) / 2)
        p50 = [one.p50_seconds * 1000 for _, one in found]
        above = [max(0.0, one.p99_seconds - one.p50_seconds) * 1000 for _, one in found]
        axes.errorbar(
            [place + shift for place, _ in found],
            p50,
            yerr=[[0.0] * len(p50), above],
            fmt="o",
            capsize=3,
            color=colour,
            label=f"batch {batch}",
        )
    axes.set_xticks(range(len(measured)), [row.stage for row in measured])
    axes.set_ylabel("milliseconds per call")
    if measured:
        axes.set_yscale("log")
        axes.legend(frameon=False)


def _seconds(axes: Axes, rows: Sequence[StageRow]) -> None:
    """What a stage and its evaluation took when they ran, now or in an earlier run."""
    for reused, colour, label in ((False, COLOURS[0], "ran now"), (True, COLOURS[4], "reused")):
        found = [(place, row.seconds) for place, row in enumerate(rows) if row.reused == reused]
        if found:
            axes.bar([place for place, _ in found], [seconds for _, seconds in found], 0.6, color=colour, label=label)
    axes.set_xticks(range(len(rows)), [row.stage for row in rows])
    axes.set_ylabel("seconds")
    axes.legend(frameon=False)


def _batches(rows: Sequence[StageRow]) -> list[int]:
    return sorted({latency.batch_size for row in rows for latency in row.latency})


def _throughput(axes: Axes, rows: Sequence[StageRow]) -> None:
    for colour, batch in zip(COLOURS, _batches(rows), strict=False):
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
