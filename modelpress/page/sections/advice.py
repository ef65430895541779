"""What was advised, what was foretold of it, and what came of it, where an advice was made."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from modelpress.page import words
from modelpress.page.parts import Figure, Section, Table
from modelpress.page.plots import Dot, dots
from modelpress.page.story import Story
from modelpress.reports.advice import AdviceCheck, AdviceReport, Advised, Metric, Outlook, Predicted, Prediction

SHOWN, LISTED = 15, 60
FORMS: dict[Metric, tuple[str, Callable[[float], str]]] = {
    "published_bytes": ("published bytes", words.size),
    "latency_seconds": ("time of a call, one sample", words.time),
    "batch_seconds": ("time of a call, many samples", words.time),
    "throughput_per_second": ("throughput", words.rate),
    "quality_drop": ("loss of quality", lambda value: f"{value:.4f}"),
}
"""What of an outlook a run measures as well."""
NAMES: dict[Metric, tuple[str, Callable[[float], str]]] = {
    **FORMS,
    "memory_bytes": ("memory", words.size),
    "cold_start_seconds": ("cold start", words.time),
    "cost_per_million": ("cost of a million samples", words.number),
}
CHECKS = 5
"""Checks that are shown, the newest."""


def section(story: Story) -> Section | None:
    """The ranking, foretold beside measured, and the checks of such advice that were kept."""
    advice = story.advice or story.report("advice", AdviceReport)
    checks = [(f"check {number}, {one.label}", one) for number, one in enumerate(story.checks, 1)][-CHECKS:]
    if advice is None and not checks:
        return None
    lead: list[str] = []
    figures, tables = [_checked(checks)], [_checks(checks)]
    if advice is not None:
        asked = ", ".join(f"{name} {words.number(value)}" for name, value in advice.budget.items() if value)
        lead = [
            f"Asked was the best {advice.objective} ({advice.binding})" + (f", within {asked}." if asked else "."),
            f"Advised is {advice.chosen}." if advice.chosen else "Nothing that a recipe can say fits what was asked.",
        ]
        figures = [_gains(advice), *figures]
        tables = [_ranking(advice), _measured(advice, story), *tables, _arguments(advice)]
    return Section(
        key="advice",
        title="What was advised",
        lead=lead,
        figures=[figure for figure in figures if figure is not None],
        tables=[table for table in tables if table.rows],
    )


def _checks(checks: Sequence[tuple[str, AdviceCheck]]) -> Table:
    """What `advise --check` kept: foretold before, measured after."""
    rows = []
    for label, check in checks:
        for one in check.rows:
            name, form = NAMES[one.metric]
            foretold = one.predicted
            rows.append(
                [
                    f"{label}: {name}",
                    _said(foretold, form),
                    f"{form(foretold.low)} to {form(foretold.high)}" if isinstance(foretold, Predicted) else "–",
                    form(one.measured) if one.measured is not None else words.UNMEASURED,
                    f"{one.ratio:.3f}" if one.ratio is not None else "–",
                    {True: "yes", False: "no", None: "–"}[one.inside],
                ]
            )
    machines = ", ".join(dict.fromkeys(check.machine for _, check in checks))
    heads = ["of", "foretold", "interval", "measured", "measured ÷ foretold", "inside"]
    caption = f"Advice that was checked, foretold on {words.cut(machines, 120)}"
    return Table(caption, heads, rows, frozenset({1, 2, 3, 4}))


def _checked(checks: Sequence[tuple[str, AdviceCheck]]) -> Figure | None:
    series = {
        label: [Dot(NAMES[one.metric][0], one.ratio) for one in check.rows if one.ratio is not None]
        for label, check in checks
    }
    series = {label: found for label, found in series.items() if found}
    if not series:
        return None
    names = list(dict.fromkeys(dot.row for found in series.values() for dot in found))
    rows = [[f"{label}: {dot.row}", f"{dot.value:.3f}"] for label, found in series.items() for dot in found]
    key = "advice-checks"
    return Figure(
        key=key,
        caption="Measured ÷ foretold of advice that was checked; at 1 it came as foretold",
        svg=dots(
            key,
            "Measured over foretold: " + ", ".join(f"{row[0]} {row[1]}" for row in rows[:8]),
            names,
            series,
            unit="measured ÷ foretold",
            line=(1.0, "as foretold"),
        ),
        table=Table("Measured ÷ foretold", ["of", "ratio"], rows, frozenset({1})),
    )


def _gains(advice: AdviceReport) -> Figure | None:
    found = [(one, one.gain) for one in advice.ranked if isinstance(one.gain, Predicted)][:SHOWN]
    if not found:
        return None
    series = {
        name: [Dot(one.label, gain.value, gain.low, gain.high) for one, gain in found if one.fits == fits]
        for fits, name in ((True, "fits"), (False, "does not fit"))
    }
    rows = [[one.label, f"{gain.value:.2f}×", f"{gain.low:.2f} to {gain.high:.2f}"] for one, gain in found]
    key = "advice-gains"
    return Figure(
        key=key,
        caption=f"How many times better in {advice.objective} each is foretold to be, with intervals",
        svg=dots(
            key,
            "Foretold gain by technique: " + ", ".join(f"{row[0]} {row[1]}" for row in rows[:6]),
            list(dict.fromkeys(one.label for one, _ in found)),
            {name: dots_ for name, dots_ in series.items() if dots_},
            unit="times better",
            line=(1.0, "as it is now"),
            apart=False,
        ),
        table=Table("Foretold gain", ["technique", "gain", "interval"], rows, frozenset({1, 2})),
    )


def _ranking(advice: AdviceReport) -> Table:
    rows = [
        [
            words.cut(one.label, 120),
            "yes" if one.fits else "no",
            _said(one.gain, lambda value: f"{value:.2f}×"),
            *(_said(_of(one.outlook, metric), form) for metric, (_, form) in FORMS.items()),
        ]
        for one in advice.ranked[:LISTED]
    ]
    heads = ["technique", "fits", "gain", *(name for name, _ in FORMS.values())]
    return Table("All techniques, as they were ranked", heads, rows, frozenset(range(2, len(heads))), folded=True)


def _measured(advice: AdviceReport, story: Story) -> Table:
    """Foretold of the advised one, beside what its run measured."""
    chosen, found = advice.advised(), _found(story, advice.batch_size)
    rows = []
    for metric, (name, form) in FORMS.items():
        foretold = _of(chosen.outlook if chosen else None, metric)
        value = found.get(metric)
        inside = "–"
        if isinstance(foretold, Predicted) and value is not None:
            inside = "yes" if foretold.low <= value <= foretold.high else "no"
        interval = f"{form(foretold.low)} to {form(foretold.high)}" if isinstance(foretold, Predicted) else "–"
        measured = form(value) if value is not None else words.UNMEASURED
        rows.append([name, _said(foretold, form), interval, measured, inside])
    heads = ["of", "foretold", "interval", "measured by this run", "inside"]
    return Table("Foretold and measured", heads, rows if chosen else [], frozenset({1, 2, 3}))


def _found(story: Story, batch_size: int) -> dict[Metric, float]:
    found: dict[Metric, float] = {}
    if story.manifest is not None:
        found["published_bytes"] = float(story.manifest.published_bytes)
    stage = story.run.stage(story.run.served) if story.run is not None else None
    if stage is None or stage.evaluation is None:
        return found
    if stage.evaluation.quality.difference is not None:
        found["quality_drop"] = -stage.evaluation.quality.difference
    for row in stage.evaluation.latency:
        if row.batch_size == 1:
            found["latency_seconds"] = row.p50_seconds
        if row.batch_size == batch_size:
            found["batch_seconds"], found["throughput_per_second"] = row.p50_seconds, row.throughput_per_second
    return found


def _arguments(advice: AdviceReport) -> Table:
    rows = [
        [words.cut(one.label, 120), what, words.cut(said)]
        for one in advice.ranked[:LISTED]
        for what, texts in _told(one)
        for said in texts
    ]
    heads = ["technique", "speaks", "why"]
    return Table("What speaks for each, and against it", heads, rows[: 3 * LISTED], folded=True)


def _told(one: Advised) -> list[tuple[str, list[str]]]:
    return [("for", one.evidence), ("against", one.counter_evidence), ("in the way", one.obstacles)]


def _of(outlook: Outlook | None, metric: Metric) -> Prediction | None:
    found: Prediction | None = getattr(outlook, metric) if outlook is not None else None
    return found


def _said(found: Prediction | None, form: Callable[[float], str]) -> str:
    return form(found.value) if isinstance(found, Predicted) else "not foretold"
