"""Variants as people read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from modelpress.reports import QualityReport, TriedVariant, VariantsReport
from modelpress.variants import choose

Table = list[dict[str, str]]
_WORDS = {"bytes": "fewest bytes", "quality": "best quality", "latency": "shortest call"}


def table(report: VariantsReport, labels: Mapping[int, str]) -> Table:
    """A row for each variant, also for those that came to no end.

    Args:
        report: of all.
        labels: by number, also of those that nothing is known of.
    """
    known = {one.number: one for one in report.variants}
    batches = sorted({row.batch_size for one in report.variants for row in one.latency})
    return [
        {
            "no": str(number),
            "variant": label,
            "quality": _quality(one.quality) if one else "–",
            "against the source": _difference(one.quality) if one else "–",
            "bytes": f"{one.size_bytes:,}" if one and one.size_bytes is not None else "–",
            **{f"p50 ms b{batch}": _p50(one, batch) for batch in batches},
            "front": _fronts(report, number),
            "verdict": _verdict(report, number, one),
            "artifact": one.artifact.sha256[:12] if one and one.artifact else "–",
        }
        for number, label in sorted(labels.items())
        for one in [known.get(number)]
    ]


def summary(report: VariantsReport) -> str:
    """How many there are, and which is the best."""
    ended = sum(one.stopped is None for one in report.variants)
    counts = {"ended": ended, "stopped": len(report.variants) - ended, "lost": len(report.lost)}
    parts = [f"{count} {how}" for how, count in counts.items() if count or how == "ended"]
    within = f"a drop of at most {report.asked.max_quality_drop:g}"
    if report.asked.max_bytes is not None:
        within += f", {report.asked.max_bytes:,} bytes"
    if report.asked.max_latency_seconds is not None:
        within += f", {1000 * report.asked.max_latency_seconds:g} ms"
    if report.best is None:
        return f"{', '.join(parts)}; none is within {within}"
    label = report.variant(report.best).label
    return f"{', '.join(parts)}; the {_WORDS[report.asked.objective]} within {within}: {label}"


def metrics(report: VariantsReport) -> dict[str, float]:
    """Numbers for a tracker: how many ended how, and those of the best."""
    numbers = {
        "variants": len(report.variants) + len(report.lost),
        "stopped": sum(one.stopped is not None for one in report.variants),
        "lost": len(report.lost),
    }
    if report.best is None:
        return dict(map(_float, numbers.items()))
    one = report.variant(report.best)
    of_best = {f"best.{name}": value for name, value in one.metrics().items() if name != "number"}
    return {**dict(map(_float, numbers.items())), **of_best}


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """The table in Markdown."""
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([row[head].replace("|", "\\|") for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _float(item: tuple[str, int]) -> tuple[str, float]:
    return item[0], float(item[1])


def _quality(found: QualityReport | None) -> str:
    return f"{found.value:.4f} [{found.low:.4f}, {found.high:.4f}]" if found else "–"


def _difference(found: QualityReport | None) -> str:
    if found is None or found.difference is None:
        return "–"
    return f"{found.difference:+.4f} [{found.difference_low:+.4f}, {found.difference_high:+.4f}]"


def _p50(one: TriedVariant | None, batch: int) -> str:
    rows = one.latency if one else []
    return next((f"{1000 * row.p50_seconds:.3f}" for row in rows if row.batch_size == batch), "–")


def _fronts(report: VariantsReport, number: int) -> str:
    found = {"bytes": report.by_bytes, "latency": report.by_latency}
    return ", ".join(name for name, numbers in found.items() if number in numbers) or "–"


def _verdict(report: VariantsReport, number: int, one: TriedVariant | None) -> str:
    if number in report.lost:
        return f"lost: {_line(report.lost[number])}"
    if one is None:
        return "–"
    if one.stopped is not None:
        return f"stopped: {_line(one.stopped)}"
    beyond = choose.beyond(one, report.asked)
    return "best" if number == report.best else "; ".join(beyond) or "within the budgets"


def _line(text: str) -> str:
    """An error's parts in one line."""
    return "; ".join(part.strip() for part in text.splitlines())
