from __future__ import annotations

import pytest

from modelpress.errors import BudgetExceededError
from modelpress.plan.search import furthest
from modelpress.plan.solver import Option, chain


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
    calls: list[int] = []

    def measure(position: int) -> float:
        calls.append(position)
        return solutions.errors[position] * ratio * (1 + position / 200)

    found = furthest(solutions, measure, budget)
    assert measure(found) <= budget
    assert found == len(solutions.moves) or measure(found + 1) > budget
    assert len(calls) <= 14


def test_a_larger_budget_never_takes_more_bytes() -> None:
    solutions = chain(problem())
    places = [furthest(solutions, lambda place: solutions.errors[place] * 1.7, budget) for budget in range(8, 3000, 97)]
    assert places == sorted(places)


def test_where_nothing_fits_both_numbers_are_named() -> None:
    solutions = chain(problem())
    with pytest.raises(BudgetExceededError, match=r"(?s)found: 4 .*at most 0\.5.*widen plan\.max_disagreement"):
        furthest(solutions, lambda place: solutions.errors[place], 0.5)
