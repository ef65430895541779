"""The plan of fewest coded bytes: what each weight costs and does by itself, and the choice that a budget allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from modelpress.agreement import Judge
from modelpress.checkpoint import Checkpoint
from modelpress.config import CompressConfig, PlanConfig
from modelpress.errors import BudgetExceededError
from modelpress.plan import held_out
from modelpress.plan.candidates import Candidate
from modelpress.plan.costs import coded_bytes, file_bytes
from modelpress.plan.data import calibration, named, samples
from modelpress.plan.importance import weighed
from modelpress.plan.search import fill, furthest, spread, too_far
from modelpress.plan.sensitivity import HOPE, measure, on_hull
from modelpress.plan.solver import Chain, Option, chain
from modelpress.plan.survey import Choice, Figures, Survey
from modelpress.plan.tensors import eligible_elements, planned_weights
from modelpress.progress import Progress, silent
from modelpress.reports import PlannedTensor, PlanPoint, PlanReport
from modelpress.workload import Workload

MeasureFront = Callable[[Sequence[tuple[int, ...]]], Iterable[Figures]]
"""The figures of choices, an option for each weight, in their order."""


def survey(
    checkpoint: Checkpoint,
    workload: Workload,
    config: PlanConfig,
    compression: CompressConfig | None,
    progress: Progress = silent,
) -> Survey:
    """The part of a plan that knows no budget: each weight by itself, and all weights alike. It takes and raises what
    `modelpress.plan.plan` does."""
    return measured(opened(checkpoint, workload, config, compression), progress)


def opened(
    checkpoint: Checkpoint, workload: Workload, config: PlanConfig, compression: CompressConfig | None
) -> Survey:
    """A survey of which nothing is measured yet."""
    model = named(checkpoint)
    batches = calibration(workload)
    weights = planned_weights(model, config)
    if any(config.sparsity):
        weights = weighed(model, weights, batches)
    return Survey(
        checkpoint=checkpoint,
        workload=workload,
        config=config,
        compression=compression,
        model=model,
        weights={one.name: one for one in weights},
        calibration=batches,
    )


def measured(found: Survey, progress: Progress = silent) -> Survey:
    """The same survey with all that it lacks measured."""
    for done, weight in enumerate(found.weights.values()):
        if weight.name not in found.curves:
            progress(done, found.steps, f"sensitivity of {weight.name}")
            found.curves[weight.name] = measure(weight, found.few, found.compression)
    vars(found).pop("few", None)  # it holds a copy of the weights, which whole plans do not need
    for done, setting in enumerate(found.settings, start=len(found.weights)):
        progress(done, found.steps, f"all weights: {setting}")
        found.uniform += _uniform(found, setting)
    return found


def settle(
    work: Survey, max_disagreement: float, progress: Progress = silent, measure_front: MeasureFront | None = None
) -> tuple[Checkpoint, PlanReport]:
    """The part of a plan that holds a budget, which may be another than the survey's config says. `measure_front`
    builds and measures the points of the front elsewhere.

    Raises:
        BudgetExceededError: no plan but the float graph is within it.
    """
    points, tried = work.config.points, dict[tuple[int, ...], float]()

    def disagreement(chosen: tuple[int, ...]) -> float:
        if chosen not in tried:
            tried[chosen] = work.disagreement(work.choice(chosen))
            progress(work.steps - points - 2, work.steps, f"disagreement {tried[chosen]:.3g} of the whole plan")
        return tried[chosen]

    filled, solutions, position = _searched(work, disagreement, max_disagreement)
    made, choice, found = _within(work, work.judge, [filled, *_backwards(solutions, position)], max_disagreement)
    size = coded_bytes(made, work.compression)
    front = [_own(size, found, work.foretold(choice))] if points else []
    places = spread(solutions, position, points)
    choices = [solutions.choice(place) for place in places]
    figures = measure_front(choices) if measure_front else _figures(work, choices, progress)
    front += [_point(solutions, *one) for one in zip(places, figures, strict=True)]
    progress(work.steps - 1, work.steps, "held-out data")
    verdict = held_out.compare(work.checkpoint, made, work.workload)
    progress(work.steps, work.steps, f"disagreement {found:.3g}")
    eligible = eligible_elements(work.model, work.config)
    planned = sum(work.weights[name].values.size for name in choice)
    return made, PlanReport(
        objective="bytes",
        divergence="kl" if work.workload.outputs == "logits" else "cosine",
        max_disagreement=max_disagreement,
        eligible_weights=eligible,
        planned_weights=planned,
        coverage=planned / eligible,
        calibration_samples=samples(work.calibration),
        predicted_disagreement=work.foretold(choice) or 0.0,
        disagreement=found,
        predicted_bytes=work.coded(choice),
        coded_bytes=size,
        unfilled_bytes=work.coded(work.choice(solutions.choice(position))),
        file_bytes=file_bytes(made),
        float_bytes=work.coded({}),
        measurements=sum(one.is_measured for curve in work.curves.values() for one in curve),
        tensors=_rows(work, choice),
        front=sorted(front, key=lambda point: (-point.coded_bytes, point.disagreement)),
        uniform=work.uniform,
        held_out_disagreement=verdict.disagreement,
        quality=verdict.quality,
    )


def _searched(
    work: Survey, disagreement: Callable[[tuple[int, ...]], float], max_disagreement: float
) -> tuple[tuple[int, ...], Chain, int]:
    """The choice of fewest bytes, the chain that it comes from, and the place of the last solution within the budget.

    What is foretold of zeros is less sure than what is of bits: the search without them may get further, and is made
    as well.

    Raises:
        BudgetExceededError: no plan but the float graph is within the budget.
    """
    every = work.options()
    kinds = [every, work.without_zeros(every)] if any(work.config.sparsity) else [every]
    found: list[tuple[tuple[int, ...], Chain, int]] = []
    for number, options in enumerate(kinds, start=1):
        solutions = chain(options)
        try:
            position = furthest(solutions, disagreement, max_disagreement, tuple(len(one) - 1 for one in options))
        except BudgetExceededError:
            if number == len(kinds) and not found:
                raise
            continue
        found.append((fill(options, solutions.choice(position), disagreement, max_disagreement), solutions, position))
    return min(found, key=lambda one: work.coded(work.choice(one[0])))


def _uniform(work: Survey, candidate: Candidate) -> Iterator[PlanPoint]:
    """All weights in one form. With zeros: only where it could save bytes, were it to disagree `HOPE` times less than
    what is foretold, and corrected as the same form without zeros was."""
    choice = work.alike(candidate)
    size = work.coded(choice)
    if candidate.sparsity:
        dense = next(one for one in work.uniform if one.label == str(candidate.dense))
        foretold, before = work.foretold(choice), dense.predicted_disagreement
        known = [Option(one.coded_bytes, one.disagreement) for one in work.uniform]
        if foretold and before and not on_hull(Option(size, foretold * dense.disagreement / before / HOPE), known):
            return
    yield PlanPoint(
        label=str(candidate),
        coded_bytes=size,
        disagreement=work.disagreement_alike(candidate),
        predicted_disagreement=work.foretold(choice),
    )


def _backwards(solutions: Chain, position: int) -> Iterator[tuple[int, ...]]:
    return (solutions.choice(place) for place in range(position, 0, -1))


def _within(
    work: Survey, judge: Judge, chosen: Sequence[tuple[int, ...]], budget: float
) -> tuple[Checkpoint, Choice, float]:
    """The first of the choices that is within the budget as it is stored: a session of its own may differ from one
    with its weights fed in the last digits."""
    least = float("inf")
    for options in chosen:
        choice = work.choice(options)
        made = work.build(choice)
        found = judge.disagreement(made)
        if found <= budget:
            return made, choice, found
        least = min(least, found)
    raise too_far(least, budget)


def _own(size: int, disagreement: float, foretold: float | None) -> PlanPoint:
    return PlanPoint(label="the plan", coded_bytes=size, disagreement=disagreement, predicted_disagreement=foretold)


def _figures(work: Survey, choices: Sequence[tuple[int, ...]], progress: Progress) -> Iterator[Figures]:
    for done, choice in enumerate(choices):
        progress(work.steps - work.config.points - 1 + done, work.steps, "Pareto front")
        yield work.figures(choice)


def _point(solutions: Chain, position: int, figures: Figures) -> PlanPoint:
    return PlanPoint(
        label=f"plan {position} of {len(solutions.moves)}",
        coded_bytes=figures[0],
        disagreement=figures[1],
        predicted_disagreement=solutions.errors[position],
    )


def _rows(work: Survey, choice: Choice) -> list[PlannedTensor]:
    rows = []
    for name, weight in work.weights.items():
        candidate, curve = choice.get(name), work.curves[name]
        taken = next((one for one in curve if one.candidate == candidate), None)
        cost = work.cost(name, candidate)
        rows.append(
            PlannedTensor(
                name=name,
                nodes=list(weight.nodes),
                shape=list(weight.values.shape),
                form=str(candidate) if candidate else "float",
                num_bits=candidate.num_bits if candidate else None,
                scale=candidate.scale if candidate else None,
                sparsity=candidate.sparsity if candidate else None,
                coded_bytes=cost.coded,
                inline_bytes=cost.inline,
                disagreement=taken.disagreement if taken else 0.0,
                is_measured=taken.is_measured if taken else True,
                measurements=sum(one.is_measured for one in curve),
                law_holds=any(not one.is_measured for one in curve if not one.candidate.sparsity),
            )
        )
    return rows
