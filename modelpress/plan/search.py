"""How far along the chain of solutions a plan may go, by what it is measured to disagree and not by what adds up."""

from __future__ import annotations

from collections.abc import Callable

from modelpress.errors import BudgetExceededError
from modelpress.plan.solver import Chain


def furthest(solutions: Chain, measure: Callable[[int], float], budget: float) -> int:
    """The position of fewest bytes that is measured to be within `budget`, in a few measurements.

    Errors of single tensors do not quite add up: the budget that the solver is given is corrected by the ratio of the
    foretold to the measured disagreement, and solved again, within the positions that measurements leave open.

    Args:
        solutions: what the solver found.
        measure: disagreement of the solution at a position.
        budget: largest disagreement.

    Raises:
        BudgetExceededError: not even the first change is within it.
    """
    within, beyond = 0, len(solutions.moves) + 1
    correction, least = 1.0, float("inf")
    while beyond - within > 1:
        aimed = solutions.solve(budget * correction)
        # Where the ratio has nothing more to say, halve what is open.
        position = aimed if within < aimed < beyond else (within + beyond) // 2
        found = measure(position)
        if found <= budget:
            within = position
        else:
            beyond, least = position, min(least, found)
        if found > 0:
            correction = solutions.errors[position] / found
    if within == 0:
        raise too_far(least, budget)
    return within


def too_far(found: float, budget: float) -> BudgetExceededError:
    """The error where nothing fits."""
    return BudgetExceededError(
        "planning within plan.max_disagreement",
        found=f"{found:.3g} on calibration data with the least of all changes",
        expected=f"at most {budget:.3g}",
        fix="widen plan.max_disagreement, or give more plan.num_bits",
    )
