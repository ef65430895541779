"""A profile in words and tables, for the terminal."""

from __future__ import annotations

from modelpress.memory import show as show_bytes
from modelpress.reports.measured import Figure, Measured, NotMeasured, value_of
from modelpress.reports.profile import OperatorProfile, ProfileReport

UNKNOWN = "–"
Row = dict[str, str]


def operators(report: ProfileReport, most: int) -> list[Row]:
    """The operators that take most of the time; with at least one row."""
    ranked = sorted(report.operators, key=lambda one: -(value_of(one.seconds) or value_of(one.modelled_seconds) or 0.0))
    return [_operator(one) for one in ranked[:most]]


def _operator(one: OperatorProfile) -> Row:
    moved = [value_of(one.read_bytes), value_of(one.written_bytes)]
    known = [size for size in moved if size is not None]
    return {
        "operator": one.name,
        "type": one.op_type,
        "in": one.dtype,
        "time": seconds(one.seconds),
        "share": percent(one.share),
        "operations": quantity(one.flops),
        "bytes": f"{sum(known):,.0f}" if len(known) == len(moved) else UNKNOWN,
        "op/byte": plain(one.intensity),
        "ceiling": seconds(one.modelled_seconds),
        "bound": one.bound or UNKNOWN,
    }


def machine(report: ProfileReport) -> list[str]:
    """The machine and its ceilings, a line each."""
    found = report.machine
    lines = [
        f"{found.cpu}, {found.cores} cores, {show_bytes(found.memory_bytes)}; {found.gpu or 'no GPU'}; "
        f"{report.runtime} with {found.threads} threads",
        f"memory {quantity(found.copy_bytes_per_second)}B/s, a call to an operator {seconds(found.call_seconds)}",
    ]
    rates = [f"{rate.dtype} {quantity(rate.flops_per_second)}op/s" for rate in found.matrix_rates]
    return [*lines, "products: " + ", ".join(rates)]


def latencies(report: ProfileReport) -> list[Row]:
    """Closed loops."""
    return [
        {
            "batch": str(row.batch_size),
            "calls": f"{row.calls:,}",
            "median": time_of(row.p50_seconds),
            "99 %": time_of(row.p99_seconds),
            "samples/s": f"{row.throughput_per_second:,.1f}",
        }
        for row in report.latency
    ]


def loads(report: ProfileReport) -> list[Row]:
    """Open loops."""
    return [
        {
            "utilisation": f"{row.utilisation:.0%}",
            "requests/s": f"{row.rate_per_second:,.1f}",
            "answered/s": f"{row.answered_per_second:,.1f}",
            "median": time_of(row.p50_seconds),
            "99 %": time_of(row.p99_seconds),
            "mean": time_of(row.mean_seconds),
            "M/G/1 mean": seconds(row.modelled_mean_seconds),
            "longest queue": f"{row.longest_queue:,}",
        }
        for row in report.load
    ]


def figures(report: ProfileReport) -> list[Row]:
    """Everything else, one figure a row."""
    memory, stored, start = report.memory, report.storage, report.cold_start
    rows = [
        ("a run, unwatched", seconds(report.totals.run_seconds), report.totals.run_seconds),
        ("operators in it", seconds(report.totals.operator_seconds), report.totals.operator_seconds),
        ("watching adds to it", percent(report.totals.watched_overhead), report.totals.watched_overhead),
        ("watching adds to all", percent(report.totals.overhead), report.totals.overhead),
        ("weights", show_bytes(memory.weights_bytes), None),
        ("activations", size(memory.activations_bytes), memory.activations_bytes),
        ("peak resident", size(memory.peak_resident_bytes), memory.peak_resident_bytes),
        ("of it with the model", size(memory.rise_resident_bytes), memory.rise_resident_bytes),
        ("stored", size(stored.stored_bytes), stored.stored_bytes),
        ("read from disk", seconds(stored.read_seconds), stored.read_seconds),
        *(
            (f"transfer, {one.network}", seconds(one.modelled_seconds), one.modelled_seconds)
            for one in stored.transfers
        ),
        ("start: interpreter", seconds(start.interpreter_seconds), start.interpreter_seconds),
        ("start: import", seconds(start.import_seconds), start.import_seconds),
        ("start: fetch", seconds(start.fetch_seconds), start.fetch_seconds),
        ("start: verify", seconds(start.verify_seconds), start.verify_seconds),
        ("start: decode", seconds(start.decode_seconds), start.decode_seconds),
        ("start: session", seconds(start.session_seconds), start.session_seconds),
        ("start: first answer", seconds(start.first_answer_seconds), start.first_answer_seconds),
        ("start to first answer", seconds(start.total_seconds), start.total_seconds),
        ("energy, processor", joules(report.energy.cpu_joules_per_request), report.energy.cpu_joules_per_request),
        ("energy, GPU", joules(report.energy.gpu_joules_per_request), report.energy.gpu_joules_per_request),
        *(
            (f"a million on {one.price}", money(one.total_per_million, one.currency), one.total_per_million)
            for one in report.costs
        ),
    ]
    return [{"figure": name, "value": shown, "": why(figure)} for name, shown, figure in rows]


def verdict(report: ProfileReport) -> list[Row]:
    """The resources, that which binds first."""
    return [
        {
            "resource": row.resource,
            "per request": seconds(row.seconds_per_request),
            "share": percent(row.share),
            "because": row.reason,
        }
        for row in report.verdict.resources
    ]


def why(figure: Figure | None) -> str:
    """How a number was found, or why there is none."""
    if figure is None:
        return ""
    return f"not measured: {figure.not_measured}" if isinstance(figure, NotMeasured) else figure.by


def quantity(figure: Figure) -> str:
    """A number with a decimal prefix."""
    if not isinstance(figure, Measured):
        return UNKNOWN
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if figure.value >= factor:
            return f"{figure.value / factor:.3g} {prefix}"
    return f"{figure.value:.3g} "


def plain(figure: Figure) -> str:
    """A number of three digits."""
    return f"{figure.value:.3g}" if isinstance(figure, Measured) else UNKNOWN


def percent(figure: Figure) -> str:
    """A share."""
    return f"{figure.value:.1%}" if isinstance(figure, Measured) else UNKNOWN


def seconds(figure: Figure) -> str:
    """A time."""
    return time_of(figure.value) if isinstance(figure, Measured) else UNKNOWN


def time_of(value: float) -> str:
    """Seconds in the unit that leaves a whole part."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if abs(value) * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def size(figure: Figure) -> str:
    """Bytes."""
    return show_bytes(int(figure.value)) if isinstance(figure, Measured) else UNKNOWN


def joules(figure: Figure) -> str:
    """Energy."""
    return f"{figure.value:.3g} J" if isinstance(figure, Measured) else UNKNOWN


def money(figure: Figure, currency: str) -> str:
    """A price."""
    return f"{figure.value:.4g} {currency}" if isinstance(figure, Measured) else UNKNOWN
