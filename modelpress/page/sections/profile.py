"""Which resource binds, where a profile was made: the verdict, the roofline, latency under load, memory, cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from modelpress.page import words
from modelpress.page.parts import Figure, Section, Table
from modelpress.page.plots import Spot, scatter
from modelpress.page.story import Story
from modelpress.reports import ProfileReport
from modelpress.reports import measured as figures
from modelpress.reports.profile import Cost, MemoryPoint, OperatorProfile

LISTED = 60


def profile_of(story: Story) -> ProfileReport | None:
    """The profile of the run, where there is one."""
    return story.profile or story.report("profile", ProfileReport)


def profiled_stage(story: Story, profile: ProfileReport) -> str | None:
    """The stage whose model was profiled: what is served, where this pack was; else the source model."""
    if "@" in profile.subject:
        served = story.run.served if story.run is not None else None
        return served if profile.subject == f"{story.name}@{(story.pack or '')[:12]}" else None
    return "source" if profile.runtime == "torch" else "source (onnx)"


def energy_and_cost(story: Story, stage: str) -> tuple[str, str]:
    """Joules of a request, and the least cost of a million, in words, where this stage's model was profiled."""
    profile = profile_of(story)
    if profile is None or profiled_stage(story, profile) != stage:
        return words.UNMEASURED, words.UNMEASURED
    energy = profile.energy
    joules = [
        figures.value_of(one)
        for one in (energy.cpu_joules_per_request, energy.memory_joules_per_request, energy.gpu_joules_per_request)
    ]
    known = [value for value in joules if value is not None]
    costs = [(cost, figures.value_of(cost.total_per_million)) for cost in profile.costs]
    cheapest = min(((value, cost) for cost, value in costs if value is not None), key=lambda one: one[0], default=None)
    cost = f"{cheapest[0]:.4g} {cheapest[1].currency} ({cheapest[1].price})" if cheapest else words.UNMEASURED
    return words.number(sum(known), "J") if known else words.UNMEASURED, cost


def section(story: Story) -> Section | None:
    """The profile's verdict and plots."""
    profile = profile_of(story)
    if profile is None:
        return None
    plots = [_roofline(profile), _latency(profile), _memory(profile)]
    machine = profile.machine
    lead = [
        f"{profile.verdict.binds} binds: {profile.verdict.reason}",
        f"Measured of {profile.subject} in {profile.runtime} on {machine.cpu}, {machine.cores} cores"
        f"{f', {machine.gpu}' if machine.gpu else ''}, batch {profile.batch_size}.",
    ]
    tables = [_resources(profile), _load(profile), _costs(profile.costs), _reasons(profile)]
    return Section(
        key="profile",
        title="Which resource binds",
        lead=lead,
        figures=[plot for plot in plots if plot is not None],
        tables=[table for table in tables if table.rows],
    )


def _resources(profile: ProfileReport) -> Table:
    rows = [
        [
            one.resource,
            _said(one.seconds_per_request, words.time),
            _said(one.share, lambda value: f"{value:.1%}"),
            one.reason,
        ]
        for one in profile.verdict.resources
    ]
    return Table("Resources, the largest first", ["resource", "of a request", "share", "why"], rows, frozenset({1, 2}))


def _roofline(profile: ProfileReport) -> Figure | None:
    """Operations per byte against operations per second, by class."""
    series: dict[str, list[Spot]] = {}
    for one in profile.operators:
        flops, seconds, intensity = (figures.value_of(figure) for figure in (one.flops, one.seconds, one.intensity))
        if flops and seconds and intensity:
            series.setdefault(one.bound or "unknown", []).append(Spot(intensity, flops / seconds))
    if not series:
        return None
    found = (figures.value_of(rate.flops_per_second) for rate in profile.machine.matrix_rates)
    rates = [rate for rate in found if rate is not None]
    copy = figures.value_of(profile.machine.copy_bytes_per_second)
    if rates and copy:
        xs = sorted(spot.x for spots in series.values() for spot in spots)
        low, high = min(xs[0], max(rates) / copy) / 2, max(xs[-1], max(rates) / copy) * 2
        series = {"roof": [Spot(x, min(copy * x, max(rates))) for x in (low, max(rates) / copy, high)], **series}
    key = "profile-roofline"
    return Figure(
        key=key,
        caption="Roofline: each mark an operator, by operations per byte and per second, under the measured ceilings",
        svg=scatter(
            key,
            f"Roofline of {sum(map(len, series.values()))} operators",
            series,
            None,
            axes_named=("operations per byte", "operations per second"),
            logs=(True, True),
            joined=frozenset({"roof"}),
        ),
        table=_operators(profile),
    )


def _latency(profile: ProfileReport) -> Figure | None:
    """Percentiles of latency, in a closed loop and under load."""
    series = {
        f"batch {row.batch_size}": [Spot(float(p), row.percentiles_seconds[p] * 1000) for p in range(0, 101, 2)]
        for row in profile.latency
    } | {
        f"load {row.utilisation:.0%}": [Spot(float(p), row.percentiles_seconds[p] * 1000) for p in range(0, 101, 2)]
        for row in profile.load
    }
    if not series:
        return None
    rows = [
        [name, *(words.time(spots[place].y / 1000) for place in (5, 25, 45, 50))]  # every second percentile
        for name, spots in series.items()
    ]
    key = "profile-latency"
    return Figure(
        key=key,
        caption="Percentiles of the time of a call, and of latency under requests that come by chance",
        svg=scatter(
            key,
            "Milliseconds by percentile, for each batch size and load",
            series,
            None,
            axes_named=("percentile", "milliseconds"),
            logs=(False, True),
            joined=frozenset(series),
        ),
        table=Table("Latency", ["of", "p10", "p50", "p90", "most"], rows, numbers=frozenset({1, 2, 3, 4})),
    )


def _memory(profile: ProfileReport) -> Figure | None:
    timeline = profile.memory.timeline
    if len(timeline) < 2:
        return None
    spots = [Spot(point.seconds, point.resident_bytes / 1e6, point.mark) for point in _thinned(timeline, 300)]
    largest = max(timeline, key=lambda point: point.resident_bytes)
    told = [("at first", timeline[0]), ("most", largest), ("at last", timeline[-1])]
    told += [(point.mark, point) for point in timeline if point.mark]
    rows = [[what, words.time(point.seconds), words.size(point.resident_bytes)] for what, point in told]
    key = "profile-memory"
    return Figure(
        key=key,
        caption="Resident memory of a process that loads and runs the model",
        svg=scatter(
            key,
            f"Resident memory over {timeline[-1].seconds:.3g} seconds",
            {"resident": spots},
            None,
            axes_named=("seconds", "MB"),
            joined=frozenset({"resident"}),
        ),
        table=Table("Memory over time", ["what", "after", "resident"], rows, numbers=frozenset({1, 2})),
    )


def _operators(profile: ProfileReport) -> Table:
    ordered = sorted(profile.operators, key=lambda one: (-(figures.value_of(one.seconds) or 0.0), one.name))
    rows = [_operator(one) for one in ordered[:LISTED]]
    if rest := ordered[LISTED:]:
        known = [value for value in (figures.value_of(one.seconds) for one in rest) if value is not None]
        rows.append([f"{len(rest):,} more", "", "", words.time(sum(known)), "", "", "", ""])
    heads = ["operator", "kind", "type", "time", "share", "operations", "operations per byte", "bound by"]
    return Table("Operators, the slowest first", heads, rows, frozenset({3, 4, 5, 6}), folded=True)


def _operator(one: OperatorProfile) -> list[str]:
    return [
        words.cut(one.name, 120),
        one.op_type,
        one.dtype,
        _said(one.seconds, words.time),
        _said(one.share, lambda value: f"{value:.1%}"),
        _said(one.flops, words.number),
        _said(one.intensity, words.number),
        one.bound or "–",
    ]


def _load(profile: ProfileReport) -> Table:
    rows = [
        [
            f"{row.utilisation:.0%}",
            words.rate(row.rate_per_second),
            words.rate(row.answered_per_second),
            words.time(row.p50_seconds),
            words.time(row.p99_seconds),
            _said(row.modelled_mean_seconds, words.time),
            str(row.longest_queue),
        ]
        for row in profile.load
    ]
    heads = ["utilisation", "asked", "answered", "p50", "p99", "mean by M/G/1", "longest queue"]
    return Table("Under open-loop load", heads, rows, frozenset(range(1, 7)))


def _costs(costs: Sequence[Cost]) -> Table:
    rows = [
        [
            cost.price,
            _money(cost.machine_per_million, cost.currency),
            _money(cost.energy_per_million, cost.currency),
            _money(cost.total_per_million, cost.currency),
        ]
        for cost in costs
    ]
    return Table(
        "A million requests cost", ["machine", "machine's hours", "energy", "total"], rows, frozenset({1, 2, 3})
    )


def _reasons(profile: ProfileReport) -> Table:
    rows = [[name, reason] for name, reason in sorted(profile.unmeasured().items())]
    return Table("What was not measured, and why", ["figure", "why"], rows, folded=True)


def _said(figure: figures.Figure, form: Callable[[float], str]) -> str:
    """A figure in words; the reasons for those that have no number are in a table of their own."""
    value = figures.value_of(figure)
    return form(value) if value is not None else words.UNMEASURED


def _money(figure: figures.Figure, currency: str) -> str:
    return _said(figure, lambda value: f"{value:.4g} {currency}")


def _thinned(points: Sequence[MemoryPoint], most: int) -> list[MemoryPoint]:
    """Every nth point, and all that are marked."""
    step = -(-len(points) // most)
    return [point for number, point in enumerate(points) if number % step == 0 or point.mark]
