"""The model's way: a row for each stage, with everything that was measured of its output."""

from __future__ import annotations

from collections.abc import Sequence

from modelpress.page import words
from modelpress.page.parts import Figure, Section, Table
from modelpress.page.plots import Dot, dots
from modelpress.page.sections.profile import energy_and_cost
from modelpress.page.story import Story
from modelpress.reports import LatencyReport, QualityReport, RunStage


def section(story: Story) -> Section | None:
    """All stages, and plots of quality, latency and throughput over them."""
    qualities = story.qualities()
    stages = [stage for stage in story.stages if stage.evaluation is not None or stage.size_bytes is not None]
    if not stages and not qualities:
        return None
    lead = ["Each stage that changes the model is followed by an evaluation on held-out samples."]
    if not stages:
        lead.append("The run's own report is not kept beside this pack, so that times and speeds are not known here.")
    figures = [_quality(story.metric, qualities), _latency(stages), _throughput(stages), _taken(stages)]
    tables = [_measured(stages), _speeds(story, stages), _further(stages)] if stages else [_numbers(qualities)]
    return Section(
        key="way",
        title="The way, stage by stage",
        lead=lead,
        tables=[table for table in tables if table is not None],
        figures=[figure for figure in figures if figure is not None],
    )


def _measured(stages: Sequence[RunStage]) -> Table:
    heads = ["stage", "runs in", "quality", "against the source", "same reasons", "bytes", "took"]
    rows = [
        [
            stage.stage,
            _runtime(stage),
            words.quality(stage.evaluation.quality) if stage.evaluation else "lossless",
            words.difference(stage.evaluation.quality) if _is_compared(stage) and stage.evaluation else "–",
            _reasons(stage),
            words.exact_bytes(stage.size_bytes) if stage.size_bytes is not None else "–",
            (words.time(stage.seconds) if stage.seconds is not None else "–") + (" (reused)" if stage.reused else ""),
        ]
        for stage in stages
    ]
    note = "Quality and differences with their intervals. Lossless stages are proved bit by bit, and not evaluated."
    return Table("Stages in the order of the line: quality and bytes", heads, rows, frozenset({2, 3, 4, 5, 6}), note)


def _speeds(story: Story, stages: Sequence[RunStage]) -> Table | None:
    judged, batches = _judged(stages)
    if not judged:
        return None
    heads = ["stage", *(f"p50 to p99, batch {batch}" for batch in batches)]
    heads += [f"throughput, batch {batch}" for batch in batches[-1:]] + ["peak memory", "energy", "cost"]
    rows = []
    for stage, found in judged:
        latency = {row.batch_size: row for row in found}
        last = latency.get(batches[-1])
        rows.append(
            [
                stage.stage,
                *(_times(latency.get(batch)) for batch in batches),
                words.rate(last.throughput_per_second if last else None),
                words.size(stage.evaluation.peak_memory_bytes if stage.evaluation else None),
                *energy_and_cost(story, stage.stage),
            ]
        )
    note = "Energy of a request and cost of a million requests are known of the model that was profiled alone."
    return Table("Time, throughput, memory, energy and cost", heads, rows, frozenset(range(1, len(heads))), note)


def _runtime(stage: RunStage) -> str:
    found = stage.evaluation
    return " · ".join(part for part in (found.runtime, found.provider, found.hardware) if part) if found else "–"


def _is_compared(stage: RunStage) -> bool:
    return stage.evaluation is not None and stage.evaluation.quality.baseline is not None


def _reasons(stage: RunStage) -> str:
    if stage.evaluation is None:
        return "–"
    found = stage.evaluation.attribution
    return f"{found.agreement:.3f} [{found.low:.3f}, {found.high:.3f}]" if found else words.UNMEASURED


def _times(row: LatencyReport | None) -> str:
    return f"{words.time(row.p50_seconds)} to {words.time(row.p99_seconds)}" if row is not None else words.UNMEASURED


def _numbers(qualities: dict[str, QualityReport]) -> Table:
    rows = [
        [stage, words.quality(one), words.difference(one) if one.difference is not None else "–", f"{one.samples:,}"]
        for stage, one in qualities.items()
    ]
    heads = ["stage", "quality", "against the source", "samples"]
    return Table("Quality by stage", heads, rows, numbers=frozenset({1, 2, 3}))


def _further(stages: Sequence[RunStage]) -> Table | None:
    """Further metrics of the same samples."""
    rows = [
        [f"{stage.stage}: {one.metric}", words.quality(one), words.difference(one)]
        for stage in stages
        if stage.evaluation
        for one in stage.evaluation.further
    ]
    heads = ["stage and metric", "value", "against the source"]
    return Table("Further metrics", heads, rows, folded=len(rows) > 8) if rows else None


def _quality(metric: str, qualities: dict[str, QualityReport]) -> Figure | None:
    if not qualities:
        return None
    name = next(iter(qualities.values())).metric if metric == "quality" else metric
    found = [Dot(stage, one.value, one.low, one.high) for stage, one in qualities.items()]
    baselines = [one.baseline for one in qualities.values() if one.baseline is not None]
    line = (baselines[0], "source model") if baselines else None
    confidence = next(iter(qualities.values())).confidence
    alt = f"{name} after each stage, with intervals: " + "; ".join(
        f"{stage} {one.value:.4f} from {one.low:.4f} to {one.high:.4f}" for stage, one in list(qualities.items())[:12]
    )
    return Figure(
        key="way-quality",
        caption=f"Quality after each stage, with {confidence:.0%} intervals; more is better",
        svg=dots("way-quality", alt, list(qualities), {name: found}, unit=name, line=line),
        table=_numbers(qualities),
    )


def _latency(stages: Sequence[RunStage]) -> Figure | None:
    judged, batches = _judged(stages)
    if not judged:
        return None
    series = {
        f"batch {batch}": [
            Dot(stage.stage, row.p50_seconds * 1000, row.p50_seconds * 1000, row.p99_seconds * 1000)
            for stage, rows in judged
            for row in rows
            if row.batch_size == batch
        ]
        for batch in batches
    }
    rows = [
        [stage.stage, str(row.batch_size), words.time(row.p50_seconds), words.time(row.p99_seconds), f"{row.calls:,}"]
        for stage, found in judged
        for row in found
    ]
    return Figure(
        key="way-latency",
        caption="Time of a call after each stage: the mark is the median, the bar ends at the 99th percentile",
        svg=dots(
            "way-latency",
            "Milliseconds of a call by stage and batch size, from the median to the 99th percentile",
            [stage.stage for stage, _ in judged],
            series,
            unit="milliseconds of a call",
            log=True,
        ),
        table=Table("Time of a call", ["stage", "batch", "p50", "p99", "calls"], rows, numbers=frozenset({1, 2, 3, 4})),
    )


def _throughput(stages: Sequence[RunStage]) -> Figure | None:
    judged, batches = _judged(stages)
    if not judged:
        return None
    series = {
        f"batch {batch}": [
            Dot(stage.stage, row.throughput_per_second)
            for stage, rows in judged
            for row in rows
            if row.batch_size == batch
        ]
        for batch in batches
    }
    rows = [
        [stage.stage, str(row.batch_size), words.rate(row.throughput_per_second)]
        for stage, all_ in judged
        for row in all_
    ]
    alt = "Samples per second by stage and batch size"
    names = [stage.stage for stage, _ in judged]
    return Figure(
        key="way-throughput",
        caption="Throughput after each stage; further to the right is faster",
        svg=dots("way-throughput", alt, names, series, unit="samples per second", log=True),
        table=Table("Throughput", ["stage", "batch", "samples per second"], rows, numbers=frozenset({1, 2})),
    )


def _taken(stages: Sequence[RunStage]) -> Figure | None:
    found = [stage for stage in stages if stage.seconds]
    if not found:
        return None
    series = {
        label: [Dot(stage.stage, stage.seconds or 0.0) for stage in found if stage.reused == reused]
        for reused, label in ((False, "ran in this run"), (True, "reused; when it ran"))
    }
    rows = [[stage.stage, words.time(stage.seconds), "yes" if stage.reused else "no"] for stage in found]
    return Figure(
        key="way-seconds",
        caption="What each stage and its evaluation took",
        svg=dots(
            "way-seconds",
            "Seconds that each stage took",
            [stage.stage for stage in found],
            {label: dots_ for label, dots_ in series.items() if dots_},
            unit="seconds",
            log=True,
        ),
        table=Table("Time taken", ["stage", "took", "reused"], rows, numbers=frozenset({1})),
    )


def _judged(stages: Sequence[RunStage]) -> tuple[list[tuple[RunStage, list[LatencyReport]]], list[int]]:
    """The stages that were timed, and the batch sizes."""
    found = [(stage, stage.evaluation.latency) for stage in stages if stage.evaluation and stage.evaluation.latency]
    return found, _batches(stages)


def _batches(stages: Sequence[RunStage]) -> list[int]:
    return sorted({row.batch_size for stage in stages if stage.evaluation for row in stage.evaluation.latency})
