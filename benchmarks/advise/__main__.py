"""Advised recipes against the best of an exhaustive search: `python -m benchmarks.advise [--quick] [--write]`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks._report import Row, main
from benchmarks.advise.cases import CASES, QUICK, Kept, found, measure_of
from benchmarks.advise.plot import MEASURED, draw
from benchmarks.advise.search import Ran
from modelpress.reports import AdviceReport, Advised, Predicted

NOTE = """\
For each case the advice names one recipe of a grid, by what it foretells; the search makes every recipe of that grid,
publishes, loads and evaluates it, and times all of them in turns. *Best* is the best of those that keep the quality
budget on the evaluation split, which the advice never sees. *Behind the best* is how much worse the advised one is in
what was asked, as measured; asked: at most 10 %. *Kept* says whether it keeps the budget on the evaluation split (1
yes). *Foretold* is what the advice said of it. In the last tables, of all recipes of a model: how far what was foretold
lies from what was measured (|measured ÷ foretold − 1|), and the share of measurements inside the foretold interval.
Bytes are those of real packs. Who is best is told by the fastest of many calls, which other work on the machine strikes
least; errors are those of medians, which is what is foretold.
"""
NAMES = {
    "published_bytes": ("bytes", "B", 1.0),
    "latency_seconds": ("latency at batch 1", "ms", 1000.0),
    "batch_seconds": ("latency at the larger batch", "ms", 1000.0),
}


def measure(quick: bool) -> Iterable[Row]:
    """Rows of all cases."""
    models = list(QUICK) if quick else list(CASES)
    kept = {}
    for model in models:
        kept[model] = found(model, quick)
        yield from _cases(model, kept[model])
    for model, one in kept.items():
        yield from _errors(model, one)
    if not quick:
        draw(kept, Path(__file__).parents[2] / "docs" / "img" / "advise.png")


def _cases(model: str, kept: Kept) -> Iterator[Row]:
    rows = {row.label: row for row in kept.rows if not row.failed}
    for (title, _), report in zip(CASES[model], kept.reports, strict=True):
        case = f"{model}: {title}"
        budget = report.budget["max_quality_drop"]
        within = [row for row in rows.values() if row.quality_drop <= budget + 1e-9]
        best = min(within, key=lambda row, report=report: measure_of(row, report), default=None)  # type: ignore[misc]
        yield from _row(case, "float", kept.now, report)
        if best is not None:
            yield from _row(case, f"best: {best.label}", best, report)
        advised = report.advised()
        if advised is None:
            yield Row(case, "advised: none", "behind the best", "%", None)
            continue
        system, row = f"advised: {advised.label}", rows.get(advised.label)
        if row is None:
            yield Row(case, system, "behind the best", "%", None)
            continue
        yield from _row(case, system, row, report)
        yield Row(case, system, "kept", "", float(row.quality_drop <= budget + 1e-9))
        if best is not None:
            behind = measure_of(row, report) / measure_of(best, report) - 1
            yield Row(case, system, "behind the best", "%", 100 * behind)
        yield from _foretold(case, advised)
    yield Row(f"{model}: time", "exhaustive search", "time", "s", kept.search_seconds)
    yield Row(f"{model}: time", "modelpress", "time", "s", kept.advice_seconds)
    yield Row(f"{model}: time", "exhaustive search", "recipes", "", float(len(kept.rows)))


def _row(case: str, system: str, row: Ran, report: AdviceReport) -> Iterator[Row]:
    unit, factor = ("B", 1.0) if report.objective == "bytes" else ("ms", 1000.0)
    name = {"throughput": "ms a batch", "bytes": "bytes"}.get(report.objective, report.objective)
    yield Row(case, system, name, unit, factor * measure_of(row, report))
    yield Row(case, system, "quality drop", "", row.quality_drop)


def _foretold(case: str, advised: Advised) -> Iterator[Row]:
    if advised.outlook is None:
        return
    for metric, (name, unit, factor) in NAMES.items():
        one = getattr(advised.outlook, metric)
        value = factor * one.value if isinstance(one, Predicted) else None
        yield Row(case, f"advised: {advised.label}", f"foretold {name}", unit, value)


def _errors(model: str, kept: Kept) -> Iterator[Row]:
    """How far off, over all recipes of the grid."""
    case = f"{model}: foretold against measured"
    for metric, (name, _, _) in NAMES.items():
        pairs = pairs_of(kept, metric)
        if not pairs:
            continue
        errors = [abs(value / one.value - 1) for one, value in pairs]
        inside = [one.low <= value <= one.high for one, value in pairs]
        yield Row(case, name, "recipes", "", float(len(pairs)))
        yield Row(case, name, "median error", "%", 100 * statistics.median(errors))
        yield Row(case, name, "largest error", "%", 100 * max(errors))
        yield Row(case, name, "inside the interval", "%", 100 * sum(inside) / len(inside))
    drops = pairs_of(kept, "quality_drop")
    if drops:
        apart = [abs(value - one.value) for one, value in drops]
        yield Row(case, "quality drop", "recipes", "", float(len(drops)))
        yield Row(case, "quality drop", "median distance", "", statistics.median(apart))
        yield Row(case, "quality drop", "inside the interval", "%", 100 * _share(drops))


def _share(pairs: list[tuple[Predicted, float]]) -> float:
    return sum(one.low <= value <= one.high for one, value in pairs) / len(pairs)


def pairs_of(kept: Kept, metric: str) -> list[tuple[Predicted, float]]:
    """Foretold and measured, of each recipe that has both; those of the first case."""
    rows = {row.label: row for row in kept.rows if not row.failed}
    found = []
    for one in kept.reports[0].ranked:
        told = getattr(one.outlook, metric) if one.outlook else None
        if isinstance(told, Predicted) and one.label in rows:
            found.append((told, float(getattr(rows[one.label], MEASURED.get(metric, metric)))))
    return found


if __name__ == "__main__":
    main("advise", measure, note=NOTE)
