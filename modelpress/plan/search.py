"""How far a plan may go, by what it is measured to disagree and not by what adds up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from modelpress.errors import BudgetExceededError
from modelpress.plan.solver import Chain, Option, knapsack, total

FILL_MEASUREMENTS = 10
"""Whole plans that are measured at most to use up what the chain leaves of a budget."""


def furthest(
    solutions: Chain,
    measure: Callable[[tuple[int, ...]], float],
    budget: float,
    unchanged: tuple[int, ...] | None = None,
) -> int:
    """The position of least cost that is measured to be within `budget`, in a few measurements.

    Errors of single tensors do not quite add up: the budget that the solver is given is corrected by the ratio of the
    foretold to the measured disagreement, and solved again, within the positions that measurements leave open.

    Args:
        solutions: what the solver found.
        measure: disagreement of a choice, an option for each tensor.
        budget: largest disagreement.
        unchanged: the choice that leaves all as it is; None: the chain's first. Another first one loses nothing and
            costs less, as where weights are on a grid already, and is a plan of its own.

    Raises:
        BudgetExceededError: not even the first change is within it.
    """
    within, beyond = 0, len(solutions.moves) + 1
    correction, least = 1.0, float("inf")
    while beyond - within > 1:
        aimed = solutions.solve(budget * correction)
        # Where the ratio has nothing more to say, halve what is open.
        position = aimed if within < aimed < beyond else (within + beyond) // 2
        found = measure(solutions.choice(position))
        if found <= budget:
            within = position
        else:
            beyond, least = position, min(least, found)
        if found > 0:
            correction = solutions.errors[position] / found
    if within == 0 and unchanged not in (None, solutions.start):
        least = min(least, measure(solutions.start))
        if least <= budget:
            return 0
    if within == 0:
        raise too_far(least, budget)
    return within


def fill(
    tensors: Sequence[Sequence[Option]],
    choice: tuple[int, ...],
    measure: Callable[[tuple[int, ...]], float],
    budget: float,
) -> tuple[int, ...]:
    """A choice of less cost than a solution of the chain that is within the budget, or that one.

    The next solution may overshoot by one large tensor, where smaller changes would still fit: the knapsack finds them.
    Its budget is corrected by what is measured, in `FILL_MEASUREMENTS` at most.

    Args:
        tensors: the options of each.
        choice: within the budget, by measurement.
        measure: disagreement of a choice.
        budget: largest disagreement.
    """
    best, found = choice, measure(choice)
    within = total(tensors, best).error
    if found <= 0 or within <= 0:
        return best
    beyond, aim = float("inf"), within * budget / found
    for _ in range(FILL_MEASUREMENTS):
        other = knapsack(tensors, aim)
        if other is None or total(tensors, other).cost >= total(tensors, best).cost or aim <= within:
            break
        found = measure(other)
        if found <= budget:
            best, within = other, aim
            aim = min(aim * budget / found if found > 0 else 2 * aim, (aim + beyond) / 2)
        else:
            beyond = aim
            aim = max(aim * budget / found, (within + aim) / 2)
    return best


def spread(solutions: Chain, chosen: int, points: int) -> list[int]:
    """Solutions beside the chosen one, over the costs between the least and the most, evenly."""
    if not points:
        return []
    last = len(solutions.moves)
    first = min(next((at for at, error in enumerate(solutions.errors) if error > 0), last), chosen)
    most, least = solutions.costs[first], solutions.costs[last]
    wanted = [most + (least - most) * part / max(points - 2, 1) for part in range(points - 1)]
    nearest = {min(range(first, last + 1), key=lambda at: abs(solutions.costs[at] - cost)) for cost in wanted}
    return sorted(nearest - {chosen})


def too_far(found: float, budget: float) -> BudgetExceededError:
    """The error where nothing fits; an infinite `found` says that there was nothing to measure."""
    return BudgetExceededError(
        "planning within plan.max_disagreement",
        found=f"{found:.3g} on calibration data with the least of all changes"
        if math.isfinite(found)
        else "no change that costs less than none",
        expected=f"at most {budget:.3g}",
        fix="widen plan.max_disagreement, or offer more than plan offers now",
    )
