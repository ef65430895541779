"""The front is what no other beats, by definition; the best is within every budget; each variant counts once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from modelpress.config import OptimizeConfig, VariantsConfig
from modelpress.errors import CorruptionError
from modelpress.reduce import AnyPartial, Ledger, Part, Partial, Variants, deal
from modelpress.reports import ArtifactRef, LatencyReport, QualityReport, TriedVariant, VariantBudgets, VariantsReport
from modelpress.variants import choose, figure, show

READER: TypeAdapter[Partial] = TypeAdapter(AnyPartial)
POINTS = st.dictionaries(
    st.integers(0, 40), st.tuples(st.integers(0, 8).map(float), st.integers(0, 8).map(float)), max_size=20
)
ASKED = VariantBudgets(objective="bytes", max_quality_drop=0.02, max_bytes=None, max_latency_seconds=None)


def tried(number: int, value: float, size: int, seconds: float | None = None, spread: float = 0.01) -> TriedVariant:
    difference = value - 0.9
    quality = QualityReport(
        metric="accuracy",
        samples=100,
        value=value,
        low=value - spread,
        high=value + spread,
        baseline=0.9,
        difference=difference,
        difference_low=difference - spread,
        difference_high=difference + spread,
    )
    ref = ArtifactRef(uri="file:///a", sha256=f"{number:064x}", size_bytes=size)
    timed = [
        LatencyReport(batch_size=size, calls=5, p50_seconds=p50, p99_seconds=p50, throughput_per_second=size / p50)
        for size, p50 in ([(1, seconds), (32, 10 * seconds)] if seconds is not None else [])
    ]
    return TriedVariant(
        number=number, label=f"n={number}", quality=quality, size_bytes=size, artifact=ref, latency=timed
    )


STOPPED = TriedVariant(number=9, label="n=9", stopped="BudgetExceededError: judging\n  found: a | drop")


@given(POINTS)
def test_the_front_is_all_that_no_other_beats(points: dict[int, tuple[float, float]]) -> None:
    def beaten(one: tuple[float, float]) -> bool:
        return any(other != one and other[0] <= one[0] and other[1] >= one[1] for other in points.values())

    found = choose.front(points)
    assert set(found) == {number for number, point in points.items() if not beaten(point)}
    assert len(found) == len(set(found))
    assert [points[number][0] for number in found] == sorted(points[number][0] for number in found)


@given(POINTS, st.randoms(use_true_random=False))
def test_the_front_hangs_on_no_order_and_of_parts_is_that_of_the_whole(
    points: dict[int, tuple[float, float]], rng: random.Random
) -> None:
    names = list(points)
    rng.shuffle(names)
    whole = choose.front(points)
    assert choose.front({name: points[name] for name in names}) == whole
    half = len(names) // 2
    parts = [choose.front({name: points[name] for name in part}) for part in (names[:half], names[half:])]
    assert choose.front({name: points[name] for part in parts for name in part}) == whole


def test_the_best_is_within_every_budget_or_there_is_none() -> None:
    small, good, fast = tried(0, 0.88, 100, 0.003), tried(1, 0.91, 300, 0.002), tried(2, 0.90, 200, 0.001)
    found = [small, good, fast, STOPPED]

    def best(**changes: object) -> int | None:
        return choose.best(found, ASKED.model_copy(update=changes))

    assert best() == 2  # 0.88 may be 0.03 below the source: the whole interval counts
    assert best(max_quality_drop=0.03001) == 0
    assert best(objective="quality") == 1
    assert best(objective="latency", max_quality_drop=1.0) == 2
    assert best(max_bytes=199, max_quality_drop=1.0) == 0
    assert best(max_bytes=99) is None
    assert best(max_latency_seconds=0.0025, objective="quality") == 1
    assert best(max_latency_seconds=0.0005) is None
    assert choose.best([tried(0, 0.9, 100)], ASKED.model_copy(update={"max_latency_seconds": 1.0})) is None
    assert choose.best([tried(4, 0.95, 100), tried(3, 0.95, 100)], ASKED) == 3
    assert choose.beyond(STOPPED, ASKED) == ["it came to no end"]
    assert len(choose.beyond(small, ASKED.model_copy(update={"max_bytes": 1, "max_latency_seconds": 1e-4}))) == 3


def test_what_may_be_lost_is_the_gates_margin_unless_it_is_said() -> None:
    recipe = OptimizeConfig.model_validate(
        {"name": "a", "workload": {"kind": "custom", "factory": "a:B"}, "gate": {"margin": 0.07}}
    )
    assert choose.budgets(recipe, VariantsConfig(also=[{}])).max_quality_drop == 0.07
    assert choose.budgets(recipe, VariantsConfig(also=[{}], max_quality_drop=0.0)).max_quality_drop == 0.0


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True), st.randoms(use_true_random=False))
def test_each_variant_counts_once_in_whatever_order_its_attempts_come(numbers: list[int], rng: random.Random) -> None:
    """What an attempt says of seconds and runs differs; the first attempt's word counts."""
    cut = deal("grid", 6, 6)
    sent = [
        Part(
            of="grid",
            slice=number,
            attempt=attempt,
            value=Variants(tried={number: tried(number, 0.9, 100).model_copy(update={"seconds": float(attempt)})}),
        )
        for number in numbers
        for attempt in (1, 2, 3)
    ]
    sent += sent[:3]
    rng.shuffle(sent)
    ledger = Ledger(cut, Variants)
    for part in sent:
        ledger.add(Part.model_validate_json(part.model_dump_json()))
    reduced = ledger.reduce(partial=True)
    assert sorted(reduced.value.tried) == sorted(numbers)
    assert {one.seconds for one in reduced.value.tried.values()} == {1.0}
    assert ledger.missing == sorted(set(range(6)) - set(numbers))
    assert reduced.coverage == len(numbers) / 6


def test_two_results_of_one_variant_do_not_merge() -> None:
    one = Variants(tried={0: tried(0, 0.9, 100)})
    with pytest.raises(ValueError, match="0 stands in two slices"):
        one.merge(one)
    assert READER.validate_json(one.model_dump_json()) == one
    assert one.merge(Variants()) == Variants().merge(one) == one
    ledger = Ledger(deal("grid", 1, 1), Variants)
    ledger.add(Part(of="grid", slice=0, attempt=1, value=one))
    with pytest.raises(CorruptionError, match="two different results"):
        ledger.add(Part(of="grid", slice=0, attempt=1, value=Variants(tried={0: tried(0, 0.8, 100)})))


def report(**changes: object) -> VariantsReport:
    found = [tried(0, 0.88, 100, 0.003), tried(1, 0.91, 300, 0.002), STOPPED]
    made = VariantsReport(
        name="small",
        asked=ASKED,
        variants=found,
        lost={2: "WorkerError: it died\n  found: signal 9"},
        by_bytes=choose.by_bytes(found),
        by_latency=choose.by_latency(found),
        best=choose.best(found, ASKED),
        source_bytes=1000,
        source_latency=found[0].latency,
    )
    return made.model_copy(update=changes)


def test_the_table_has_a_row_for_each_and_says_why_where_there_is_no_number() -> None:
    labels = {0: "n=0", 1: "n=1", 2: "n=2", 9: "n=9"}
    rows = show.table(report(), labels)
    assert [row["variant"] for row in rows] == list(labels.values())
    assert [row["front"] for row in rows] == ["bytes", "bytes, latency", "–", "–"]
    assert rows[0]["verdict"] == "a drop of up to 0.0300, asked 0.0200"
    assert rows[1]["verdict"] == "best"
    assert rows[2]["verdict"] == "lost: WorkerError: it died; found: signal 9"
    assert rows[3]["verdict"] == "stopped: BudgetExceededError: judging; found: a | drop"
    assert (rows[1]["p50 ms b1"], rows[1]["p50 ms b32"], rows[3]["bytes"]) == ("2.000", "20.000", "–")
    assert show.markdown(rows).count("\n") == 5
    assert "a \\| drop" in show.markdown(rows)
    assert show.summary(report()) == ("2 ended, 1 stopped, 1 lost; the fewest bytes within a drop of at most 0.02: n=1")
    assert show.summary(report(best=None)).endswith("none is within a drop of at most 0.02")
    assert show.metrics(report())["best.size_bytes"] == 300.0
    assert show.metrics(report(best=None)) == {"variants": 4.0, "stopped": 1.0, "lost": 1.0}


def test_the_plot_is_drawn_also_where_nothing_came_to_an_end(tmp_path: Path) -> None:
    nothing = report(variants=[STOPPED], by_bytes=[], by_latency=[], best=None, source_bytes=None, source_latency=[])
    for name, one in (("all", report()), ("none", nothing)):
        figure.draw(one, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
