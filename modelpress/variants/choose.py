"""Which variants no other beats, and which is the best within the budgets. Arithmetic alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from modelpress.config import OptimizeConfig, VariantsConfig
from modelpress.reports import LatencyReport, TriedVariant, VariantBudgets


def budgets(recipe: OptimizeConfig, variants: VariantsConfig) -> VariantBudgets:
    """What is asked of the best; what a variant may lose is what the gate will let it lose, unless it is said."""
    drop = variants.max_quality_drop
    return VariantBudgets(
        objective=variants.objective,
        max_quality_drop=recipe.gate.margin if drop is None else drop,
        max_bytes=variants.max_bytes or None,
        max_latency_seconds=variants.max_latency_seconds or None,
    )


def front(points: Mapping[int, tuple[float, float]]) -> list[int]:
    """Those that no other beats, the cheapest first; of equal points, all.

    Args:
        points: by number, what it costs (less is better), and what it is worth (more is better).
    """
    found: list[int] = []
    for number in sorted(points, key=lambda number: (points[number][0], -points[number][1], number)):
        if not found or points[number][1] > points[found[-1]][1] or points[number] == points[found[-1]]:
            found.append(number)
    return found


def by_bytes(tried: Iterable[TriedVariant]) -> list[int]:
    """The front of bytes and quality."""
    return front(
        {one.number: (one.size_bytes, one.quality.value) for one in tried if one.quality and one.size_bytes is not None}
    )


def by_latency(tried: Iterable[TriedVariant]) -> list[int]:
    """The front of latency and quality; empty where nothing was timed."""
    return front(
        {
            one.number: (timed.p50_seconds, one.quality.value)
            for one in tried
            if one.quality and (timed := call(one.latency)) is not None
        }
    )


def call(latency: Sequence[LatencyReport]) -> LatencyReport | None:
    """What is said of a call's time: at the smallest measured batch. None: nothing was measured."""
    return min(latency, key=lambda row: row.batch_size, default=None)


def beyond(one: TriedVariant, asked: VariantBudgets) -> list[str]:
    """Why a variant is not within the budgets; empty where it is. What was not measured is within none."""
    if one.quality is None or one.size_bytes is None:
        return ["it came to no end"]
    found = []
    low = one.quality.difference_low
    if low is None or low < -asked.max_quality_drop:
        lost = "a drop that is not known" if low is None else f"a drop of up to {-low:.4f}"
        found.append(f"{lost}, asked {asked.max_quality_drop:.4f}")
    if asked.max_bytes is not None and one.size_bytes > asked.max_bytes:
        found.append(f"{one.size_bytes:,} bytes, asked {asked.max_bytes:,}")
    if asked.max_latency_seconds is not None:
        timed = call(one.latency)
        if timed is None:
            found.append("a latency that was not measured")
        elif timed.p50_seconds > asked.max_latency_seconds:
            found.append(f"{1000 * timed.p50_seconds:.3f} ms, asked {1000 * asked.max_latency_seconds:.3f}")
    return found


def best(tried: Iterable[TriedVariant], asked: VariantBudgets) -> int | None:
    """The number of the best within the budgets; of equals the smaller, then the first. None: none is within."""

    def worth(one: TriedVariant) -> tuple[float, int, int]:
        assert one.quality is not None
        assert one.size_bytes is not None
        timed = call(one.latency)
        value = {
            "bytes": float(one.size_bytes),
            "quality": -one.quality.value,
            "latency": timed.p50_seconds if timed is not None else float("inf"),
        }[asked.objective]
        return value, one.size_bytes, one.number

    within = [one for one in tried if not beyond(one, asked)]
    return min(within, key=worth).number if within else None
