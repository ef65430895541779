"""Each slice counts once: not twice when it was retried, and not at all in silence."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from modelpress.errors import CorruptionError, CoverageError, StageError
from modelpress.reduce import ChannelMoments, Cut, Ledger, Moments, Part, WeightedMean, deal, deal_by_cost

SEVEN = [[3, 4, 7], [2, 8, 9], [0, 1, 5, 6]]
"""By `printf 7:UNIT | sha256sum`, sorted."""


def parts_of(cut: Cut, values: np.ndarray, attempt: int = 1) -> list[Part]:
    return [
        Part(of=cut.of, slice=number, attempt=attempt, value=WeightedMean.of(values[units]))
        for number, units in enumerate(cut.slices)
    ]


@given(st.integers(1, 60), st.integers(1, 70), st.none() | st.integers(0, 5))
def test_each_unit_is_dealt_once_and_slices_are_alike(units: int, slices: int, seed: int | None) -> None:
    cut = deal("work", units, slices, seed)
    assert sorted(unit for one in cut.slices for unit in one) == list(range(units))
    assert max(map(len, cut.slices)) - min(map(len, cut.slices)) <= 1
    assert cut == deal("work", units, slices, seed)
    assert Cut.model_validate_json(cut.model_dump_json()) == cut


def test_a_seed_deals_the_same_in_every_version() -> None:
    assert deal("work", 10, 3, seed=7).slices == SEVEN
    assert deal("work", 10, 3, seed=8).slices != SEVEN
    assert deal("work", 10, 3).slices == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.integers(1, 9), st.integers(0, 3))
def test_slices_by_cost_are_near_the_best_cut_there_is(costs: list[int], slices: int, seed: int) -> None:
    cut = deal_by_cost("work", [float(cost) for cost in costs], slices, seed)
    assert sorted(unit for one in cut.slices for unit in one) == list(range(len(costs)))
    count = min(slices, len(costs))
    assert len(cut.slices) == count
    totals = [sum(costs[unit] for unit in one) for one in cut.slices]
    assert totals == sorted(totals, reverse=True)
    best = min(
        max(sum(cost for cost, place in zip(costs, places, strict=True) if place == one) for one in range(count))
        for places in itertools.product(range(count), repeat=len(costs))
        if count <= 3 or places[0] == 0
    )
    assert max(totals) <= best * (4 / 3 - 1 / (3 * count)) + 1e-9


def test_one_dear_unit_has_a_slice_for_itself() -> None:
    assert deal_by_cost("work", [1.0, 9.0, 1.0, 1.0], 2).slices == [[1], [0, 2, 3]]


def test_units_of_one_cost_are_dealt_by_the_seed() -> None:
    even = [1.0] * 12
    cut = deal_by_cost("work", even, 4, seed=7)
    assert [len(one) for one in cut.slices] == [3] * 4
    assert cut == deal_by_cost("work", even, 4, seed=7) != deal_by_cost("work", even, 4, seed=8)


@pytest.mark.parametrize(
    ("costs", "slices"), [([], 1), ([1.0], 0), ([-1.0], 1), ([float("nan")], 1), ([float("inf")], 1)]
)
def test_what_has_no_cost_is_not_dealt(costs: list[float], slices: int) -> None:
    with pytest.raises(ValueError, match=r"cannot be dealt|costs must be finite"):
        deal_by_cost("work", costs, slices)


@given(
    st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=30),
    st.integers(1, 8),
    st.lists(st.tuples(st.integers(0, 7), st.integers(1, 3)), max_size=20),
    st.randoms(use_true_random=False),
)
def test_retries_in_any_order_give_the_one_process_result(
    values: list[float], slices: int, retries: list[tuple[int, int]], chance: random.Random
) -> None:
    array = np.array(values)
    cut = deal("work", len(values), slices, seed=1)
    sent = parts_of(cut, array)
    sent += [sent[number % len(sent)].model_copy(update={"attempt": attempt}) for number, attempt in retries]
    chance.shuffle(sent)
    ledgers = [Ledger(cut, WeightedMean) for _ in range(3)]
    for part in sent:
        chance.choice(ledgers).add(part)
    chance.shuffle(ledgers)
    ledgers[0].join(ledgers[1])
    ledgers[0].join(ledgers[2])
    assert ledgers[0].reduce().value == WeightedMean.of(array)
    assert ledgers[0].reduce().coverage == 1.0


def test_the_first_attempt_counts_whichever_comes_first() -> None:
    """Two attempts may differ in the last digit, on machines that do."""
    cut = deal("work", 1, 1)
    attempts = [Part(of="work", slice=0, attempt=n, value=WeightedMean.of([float(n)])) for n in (1, 2, 3)]
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        ledger = Ledger(cut, WeightedMean)
        for place in order:
            ledger.add(attempts[place])
        assert ledger.reduce().value.mean() == 1.0


def test_a_missing_slice_is_an_error_or_says_its_coverage() -> None:
    values = np.arange(10.0)
    cut = deal("work", 10, 4)
    ledger = Ledger(cut, WeightedMean)
    for part in parts_of(cut, values)[1:]:
        ledger.add(part)
    assert ledger.missing == [0]
    with pytest.raises(CoverageError, match="slices 0"):
        ledger.reduce()
    found = ledger.reduce(partial=True)
    assert (found.slices, found.of_slices, found.units, found.coverage) == (3, 4, 8, 0.8)
    assert found.value.mean() == values[2:].mean()
    with pytest.raises(CoverageError, match="one at least"):
        Ledger(cut, WeightedMean).reduce(partial=True)


def test_one_cut_gives_one_result_to_the_bit_also_where_merges_round() -> None:
    rows = np.random.default_rng(0).normal(size=(40, 3))
    cut = deal("work", 40, 7)
    sent = [
        Part(of="work", slice=number, attempt=1, value=ChannelMoments.of(rows[units]))
        for number, units in enumerate(cut.slices)
    ]
    results = set()
    for seed in range(5):
        random.Random(seed).shuffle(sent)
        ledger = Ledger(cut, ChannelMoments)
        for part in sent:
            ledger.add(part)
        results.add(ledger.reduce().value.model_dump_json())
    assert len(results) == 1


def test_what_is_of_other_work_is_refused() -> None:
    ledger = Ledger(deal("work", 4, 2), WeightedMean)
    good = WeightedMean.of([1.0])
    with pytest.raises(StageError, match="a slice of other"):
        ledger.add(Part(of="other", slice=0, attempt=1, value=good))
    with pytest.raises(StageError, match="slice 2"):
        ledger.add(Part(of="work", slice=2, attempt=1, value=good))
    with pytest.raises(StageError, match="Moments"):
        ledger.add(Part(of="work", slice=0, attempt=1, value=Moments.of([1.0])))
    assert ledger.missing == [0, 1]


def test_one_attempt_cannot_say_two_things() -> None:
    ledger = Ledger(deal("work", 4, 2), WeightedMean)
    ledger.add(Part(of="work", slice=0, attempt=1, value=WeightedMean.of([1.0])))
    ledger.add(Part(of="work", slice=0, attempt=1, value=WeightedMean.of([1.0])))
    with pytest.raises(CorruptionError, match="two different results"):
        ledger.add(Part(of="work", slice=0, attempt=1, value=WeightedMean.of([2.0])))


@pytest.mark.parametrize("slices", [[[0, 1], [1]], [[0], [2]], [[0], []], [[1, 0]], [[-1, 0]]])
def test_a_cut_that_loses_or_doubles_is_refused(slices: list[list[int]]) -> None:
    with pytest.raises(ValidationError):
        Cut(of="work", slices=slices)


@pytest.mark.parametrize(("units", "slices"), [(0, 1), (1, 0), (-1, 1)])
def test_nothing_cannot_be_dealt(units: int, slices: int) -> None:
    with pytest.raises(ValueError, match="cannot be dealt"):
        deal("work", units, slices)


def test_the_example_of_the_documentation_runs() -> None:
    page = Path(__file__).parents[2] / "docs" / "parallel-tasks.md"
    (code,) = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    exec(compile(code, str(page), "exec"), {})
