from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from modelpress.plan.solver import STEPS, Option, chain, hull, knapsack, total

OPTIONS = st.lists(st.builds(Option, st.integers(0, 50), st.integers(0, 50).map(float)), min_size=1, max_size=4)
PROBLEMS = st.lists(OPTIONS, min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(PROBLEMS)
def test_no_choice_at_all_beats_a_solution_at_its_own_error(tensors: list[list[Option]]) -> None:
    found = chain(tensors)
    every = [total(tensors, choice) for choice in itertools.product(*(range(len(options)) for options in tensors))]
    for position in range(len(found.moves) + 1):
        cost = total(tensors, found.choice(position))
        assert cost.cost == found.costs[position]
        assert abs(cost.error - found.errors[position]) < 1e-9
        assert cost.cost == min(one.cost for one in every if one.error <= cost.error)


@settings(max_examples=200, deadline=None)
@given(PROBLEMS, st.integers(0, 200))
def test_a_budget_is_spent_up_to_the_hull(tensors: list[list[Option]], budget: int) -> None:
    """Brute force cannot be better than the line between the two solutions next to the budget."""
    found = chain(tensors)
    position = found.solve(budget)
    every = [total(tensors, choice) for choice in itertools.product(*(range(len(options)) for options in tensors))]
    allowed = [one.cost for one in every if one.error <= budget]
    if not allowed:
        assert position == 0
        return
    assert found.errors[position] <= budget
    if position == len(found.moves):
        assert found.costs[position] == min(allowed)
        return
    saved = found.costs[position] - found.costs[position + 1]
    share = (budget - found.errors[position]) / (found.errors[position + 1] - found.errors[position])
    assert found.costs[position] - share * saved <= min(allowed) + 1e-6 <= found.costs[position] + 1e-6


@settings(max_examples=100, deadline=None)
@given(PROBLEMS)
def test_bytes_fall_and_errors_rise_along_the_chain(tensors: list[list[Option]]) -> None:
    found = chain(tensors)
    assert all(before > after for before, after in itertools.pairwise(found.costs))
    assert all(before < after for before, after in itertools.pairwise(found.errors))


def test_what_lies_above_the_hull_is_left_out() -> None:
    options = [Option(100, 0.0), Option(90, 1.0), Option(40, 2.0), Option(40, 3.0), Option(0, 100.0)]
    assert hull(options) == [0, 2, 4]


@settings(max_examples=200, deadline=None)
@given(PROBLEMS, st.integers(1, 200))
def test_the_knapsack_is_exact_but_for_the_rounding_of_errors(tensors: list[list[Option]], budget: int) -> None:
    found = knapsack(tensors, budget)
    every = [total(tensors, choice) for choice in itertools.product(*(range(len(options)) for options in tensors))]
    strict = [one.cost for one in every if one.error <= budget * (1 - len(tensors) / STEPS)]
    if found is None:
        assert not strict
        return
    cost = total(tensors, found)
    assert cost.error <= budget
    assert cost.cost <= min(strict, default=cost.cost)
    assert cost.cost >= min(one.cost for one in every if one.error <= budget)
