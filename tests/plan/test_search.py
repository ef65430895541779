from __future__ import annotations

import pytest

from modelpress.errors import BudgetExceededError
from modelpress.plan.search import fill, furthest
from modelpress.plan.solver import Option, chain, total


def problem(tensors: int = 30) -> list[list[Option]]:
    """Each tensor halves its bytes four times, and quadruples its error each time."""
    return [
        [Option(1600 >> step, (1 + place) * 4.0**step if step else 0.0) for step in range(5)]
        for place in range(tensors)
    ]


@pytest.mark.parametrize("ratio", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("budget", [15.0, 200.0, 2000.0])
def test_the_last_solution_that_is_measured_to_fit_is_found(ratio: float, budget: float) -> None:
    """However wrong the sum is, and in fewer measurements than there are solutions."""
    solutions = chain(problem())
    positions = {solutions.choice(place): place for place in range(len(solutions.moves) + 1)}
    calls: list[int] = []

    def measure(chosen: tuple[int, ...]) -> float:
        position = positions[chosen]
        calls.append(position)
        return solutions.errors[position] * ratio * (1 + position / 200)

    found = furthest(solutions, measure, budget)
    assert measure(solutions.choice(found)) <= budget
    assert found == len(solutions.moves) or measure(solutions.choice(found + 1)) > budget
    assert len(calls) <= 14


def test_a_larger_budget_never_takes_more_bytes() -> None:
    tensors = problem()
    solutions = chain(tensors)
    places = [
        furthest(solutions, lambda chosen: total(tensors, chosen).error * 1.7, budget) for budget in range(8, 3000, 97)
    ]
    assert places == sorted(places)


def test_where_nothing_fits_both_numbers_are_named() -> None:
    tensors = problem()
    solutions = chain(tensors)
    with pytest.raises(BudgetExceededError, match=r"(?s)found: 4 .*at most 0\.5.*widen plan\.max_disagreement"):
        furthest(solutions, lambda chosen: total(tensors, chosen).error, 0.5)


@pytest.mark.parametrize("lossy", [[], [Option(60, 1.0)]])
def test_what_loses_nothing_is_a_plan_whatever_the_budget(lossy: list[Option]) -> None:
    tensors = [[Option(100, 0.0), *lossy, Option(800, 0.0)]] * 2
    unchanged = (len(tensors[0]) - 1,) * 2
    solutions = chain(tensors)
    assert furthest(solutions, lambda chosen: total(tensors, chosen).error, 1e-6, unchanged) == 0
    assert solutions.choice(0) == (0, 0) != unchanged


def test_where_nothing_is_cheaper_no_number_is_made_up() -> None:
    tensors = [[Option(900, 0.1), Option(800, 0.0)]] * 2
    with pytest.raises(BudgetExceededError, match="found: no change that costs less"):
        furthest(chain(tensors), lambda chosen: total(tensors, chosen).error, 1.0, (1, 1))


@pytest.mark.parametrize("ratio", [0.3, 1.0, 2.5])
def test_what_one_large_tensor_leaves_is_filled_by_smaller_ones(ratio: float) -> None:
    """The chain stops before the large tensor, of best saving; the small ones behind it fit."""
    large = [Option(10_000, 0.0), Option(1_000, 50.0)]
    small = [[Option(100, 0.0), Option(60, 1.0), Option(50, 4.0)] for _ in range(8)]
    tensors = [large, *small]
    solutions = chain(tensors)
    calls: list[tuple[int, ...]] = []

    def measure(chosen: tuple[int, ...]) -> float:
        calls.append(chosen)
        return total(tensors, chosen).error * ratio

    budget = 20.0 * ratio
    position = solutions.solve(20.0)
    assert position == 0, "the large tensor comes first, and does not fit"
    first = solutions.choice(0)[:1] + (1,) + (0,) * 7
    filled = fill(tensors, first, measure, budget)
    assert total(tensors, filled).error * ratio <= budget
    assert total(tensors, filled).cost == 10_000 + 4 * 60 + 4 * 50
    assert len(calls) <= 11
