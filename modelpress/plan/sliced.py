"""The measurements of a survey as units of work that any process can do: each weight by itself, each form for all.

A unit's number is its place in `units`. What depends on other measurements is none of them: forms with zeros for all
weights are tried only where those without have shown that it may pay.
"""

from __future__ import annotations

from collections.abc import Sequence

from modelpress.errors import StageError
from modelpress.plan.candidates import Candidate
from modelpress.plan.costs import Cost, float_cost
from modelpress.plan.sensitivity import Measured, measure
from modelpress.plan.survey import Survey
from modelpress.reduce import Points, Sensitivities, Sensitivity


def units(work: Survey) -> list[str]:
    """Names of the weights, then of the forms without zeros for all of them."""
    return [*work.weights, *(str(one) for one in _dense(work))]


def costs(work: Survey) -> list[float]:
    """About what each unit takes, relative to one another, in the order of `units`.

    To measure a weight is to run the graph on a few samples, some times, and to code the weight in each form; a form
    for all weights is one run on all samples. The shares are those of a sentence encoder on a CPU, where a weight of
    half of all elements took 2.5 times a small one's 1.4 s, and a form 0.85 s.
    """
    sizes = [one.values.size for one in work.weights.values()]
    return [*(sum(sizes) + 3.0 * size for size in sizes), *(0.6 * sum(sizes) for _ in _dense(work))]


def measure_units(work: Survey, numbers: Sequence[int]) -> Sensitivities:
    """Measure units by their numbers.

    Raises:
        StageError: there is no such unit: the graph or the config is another.
    """
    weights, dense = list(work.weights.values()), _dense(work)
    unknown = [number for number in numbers if not 0 <= number < len(weights) + len(dense)]
    if unknown:
        raise StageError(
            "measuring a slice of a plan",
            found=f"unit {unknown[0]}",
            expected=f"one of {len(weights)} weights and {len(dense)} forms",
        )
    curves = [weights[number] for number in numbers if number < len(weights)]
    alike = [dense[number - len(weights)] for number in numbers if number >= len(weights)]
    return Sensitivities(
        weights={one.name: [_told(row) for row in measure(one, work.few, work.compression)] for one in curves},
        alike={str(one): work.disagreement(work.alike(one)) for one in alike},
        floats={one.name: tuple(float_cost(one, work.compression)) for one in curves},
    )


def measure_points(work: Survey, choices: Sequence[Sequence[int]], numbers: Sequence[int]) -> Points:
    """Build and measure some of the choices, each an option for every weight, by their numbers.

    Raises:
        StageError: a choice of another graph.
    """
    for number in numbers:
        if number >= len(choices) or len(choices[number]) != len(work.weights):
            raise StageError(
                "measuring a point of a plan's front",
                found=f"point {number} of {len(choices)}, of other weights",
                expected=f"an option for each of {len(work.weights)} weights",
            )
    return Points(points={number: work.figures(choices[number]) for number in numbers})


def take(work: Survey, found: Sensitivities) -> None:
    """Fill a survey with what was measured elsewhere.

    Raises:
        StageError: it is of another graph or config.
    """
    for name, rows in found.weights.items():
        curve = [_heard(row) for row in rows]
        offered = work.weights[name].candidates if name in work.weights else ()
        if tuple(one.candidate for one in curve) != offered:
            raise StageError(
                "taking the slices of a plan",
                found=f"{len(curve)} forms of {name!r}",
                expected=f"the {len(offered)} that this graph and config offer",
            )
        work.curves[name] = curve
    work.known_alike |= found.alike
    work.known_floats |= {name: Cost(*sizes) for name, sizes in found.floats.items()}


def _dense(work: Survey) -> list[Candidate]:
    return [one for one in work.settings if not one.sparsity]


def _told(row: Measured) -> Sensitivity:
    return Sensitivity(
        num_bits=row.candidate.num_bits,
        scale=row.candidate.scale,
        sparsity=row.candidate.sparsity,
        coded_bytes=row.cost.coded,
        inline_bytes=row.cost.inline,
        error=row.error,
        disagreement=row.disagreement,
        is_measured=row.is_measured,
    )


def _heard(row: Sensitivity) -> Measured:
    candidate = Candidate(row.num_bits, row.scale, row.sparsity)
    cost = Cost(row.coded_bytes, row.inline_bytes)
    return Measured(candidate, cost, row.error, row.disagreement, row.is_measured)
