"""One search that spends a quality budget where it saves the most published bytes.

Every weight of a float graph is given its own bits and its own sharing of scales: those with which all together agree
with the float graph as closely as asked, in the fewest bytes after lossless coding. The graph still computes in float:
this is about what is stored and sent, not about speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from onnx import ModelProto

from modelpress import graph
from modelpress.checkpoint import Checkpoint
from modelpress.config import CompressConfig, PlanConfig
from modelpress.errors import WorkloadError
from modelpress.plan import held_out
from modelpress.plan.candidates import Candidate
from modelpress.plan.costs import coded_bytes, file_bytes
from modelpress.plan.judge import FedWeights, Inputs, Judge
from modelpress.plan.rewrite import stored_weights
from modelpress.plan.search import furthest, too_far
from modelpress.plan.sensitivity import least_measurements, measure
from modelpress.plan.solver import Chain, Option, chain
from modelpress.plan.survey import Choice, Survey
from modelpress.plan.tensors import PlannedWeight, planned_weights
from modelpress.progress import Progress, silent
from modelpress.quantize.rewrite import name_nodes_
from modelpress.reports import PlannedTensor, PlanOutline, PlanPoint, PlanReport
from modelpress.workload import Workload

__all__ = ["Survey", "outline", "plan", "settle", "survey", "uniform_checkpoint"]

BATCH = 8
LEAST_SAMPLES = 8
"""Of calibration: fewer say nothing about a model."""


def outline(checkpoint: Checkpoint, workload: Workload, config: PlanConfig) -> list[PlanOutline]:
    """What `plan` would look at, without its measurements. Bad input is found here.

    Raises:
        ConfigError: a pattern that matches nothing, or a group size that divides nothing.
        CoverageError: nothing to plan.
        StageError: weights that are NaN or infinite.
        WorkloadError: too few calibration samples.
        CorruptionError: no ONNX checkpoint.
    """
    weights = planned_weights(_named(checkpoint), config)
    _calibration(workload)
    return [
        PlanOutline(
            name=weight.name,
            nodes=list(weight.nodes),
            shape=list(weight.values.shape),
            candidates=[str(one) for one in weight.candidates],
            least_measurements=least_measurements(weight),
        )
        for weight in weights
    ]


def plan(
    checkpoint: Checkpoint,
    workload: Workload,
    config: PlanConfig,
    compression: CompressConfig | None = None,
    progress: Progress = silent,
) -> tuple[Checkpoint, PlanReport]:
    """Plan a float ONNX checkpoint; the checkpoint given is left as it is.

    Args:
        checkpoint: float ONNX graph.
        workload: its calibration split is what the plan is made on, its evaluation split what it is judged on.
        config: the budget and what may be chosen.
        compression: how the pack will be coded; None: as `CompressConfig()` says.
        progress: told of each weight, each setting and each point of the front.

    Returns:
        The planned checkpoint, and what was chosen, foretold and measured.

    Raises:
        BudgetExceededError: no plan but the float graph is within `max_disagreement`.
        And all that `outline` raises.
    """
    return settle(survey(checkpoint, workload, config, compression, progress), config.max_disagreement, progress)


def survey(
    checkpoint: Checkpoint,
    workload: Workload,
    config: PlanConfig,
    compression: CompressConfig | None = None,
    progress: Progress = silent,
) -> Survey:
    """The part of `plan` that knows no budget: each weight by itself, and all weights alike. It takes and raises what
    `plan` does."""
    model = _named(checkpoint)
    weights = planned_weights(model, config)
    calibration = _calibration(workload)
    values = {one.name: one.values for one in weights}
    few = FedWeights(model, values, _some(calibration, config.sensitivity_samples), workload.outputs)
    found = Survey(
        checkpoint=checkpoint,
        workload=workload,
        config=config,
        compression=compression or CompressConfig(),
        model=model,
        weights={one.name: one for one in weights},
        calibration=calibration,
        fed=FedWeights(model, values, calibration, workload.outputs),
    )
    for done, weight in enumerate(weights):
        progress(done, found.steps, f"sensitivity of {weight.name}")
        found.curves[weight.name] = measure(weight, few, found.compression)
    for candidate in (Candidate(bits, scale) for scale in config.scales for bits in config.num_bits):
        progress(len(weights) + len(found.uniform), found.steps, f"all weights: {candidate}")
        found.uniform.append(_uniform(found, candidate))
    return found


def settle(work: Survey, max_disagreement: float, progress: Progress = silent) -> tuple[Checkpoint, PlanReport]:
    """The part of `plan` that holds a budget, which may be another than the survey's config says.

    Raises:
        BudgetExceededError: no plan but the float graph is within it.
    """
    solutions = chain([[*_options(work, weight)] for weight in work.weights.values()])
    points, tried = work.config.points, dict[int, float]()

    def disagreement(position: int) -> float:
        if position not in tried:
            tried[position] = work.fed.disagreement(work.dequantized(work.choice(solutions, position)))
            progress(work.steps - points - 2, work.steps, f"disagreement {tried[position]:.3g} of the whole plan")
        return tried[position]

    judge = Judge(work.checkpoint, work.calibration, work.workload.outputs)
    position = furthest(solutions, disagreement, max_disagreement)
    made = work.build(work.choice(solutions, position))
    found = judge.disagreement(made)
    while found > max_disagreement and position > 1:  # a session of its own may differ in the last digits
        position -= 1
        made = work.build(work.choice(solutions, position))
        found = judge.disagreement(made)
    if found > max_disagreement:
        raise too_far(found, max_disagreement)
    front = []
    for done, place in enumerate(_places(solutions, position, points)):
        progress(work.steps - points - 1 + done, work.steps, "Pareto front")
        front.append(_point(work, solutions, place, judge))
    progress(work.steps - 1, work.steps, "held-out data")
    verdict = held_out.compare(work.checkpoint, made, work.workload)
    progress(work.steps, work.steps, f"disagreement {found:.3g}")
    choice = work.choice(solutions, position)
    return made, PlanReport(
        divergence="kl" if work.workload.outputs == "logits" else "cosine",
        max_disagreement=max_disagreement,
        calibration_samples=sum(len(next(iter(batch.values()))) for batch in work.calibration),
        predicted_disagreement=solutions.errors[position],
        disagreement=found,
        predicted_bytes=work.coded(choice),
        coded_bytes=coded_bytes(made, work.compression),
        file_bytes=file_bytes(made),
        float_bytes=work.coded({}),
        measurements=sum(one.is_measured for curve in work.curves.values() for one in curve),
        tensors=_rows(work, choice),
        front=front,
        uniform=work.uniform,
        held_out_disagreement=verdict.disagreement,
        quality=verdict.quality,
    )


def uniform_checkpoint(checkpoint: Checkpoint, candidate: Candidate, config: PlanConfig) -> Checkpoint:
    """The checkpoint in which every weight that the config takes has one form, as `PlanReport.uniform` has them."""
    model = _named(checkpoint)
    weights = {one.name: one for one in planned_weights(model, config)}
    made = graph.split(stored_weights(model, _same(weights, candidate), weights))
    return Checkpoint("onnx", made.tensors, checkpoint.files | made.files, checkpoint.metadata)


def _named(checkpoint: Checkpoint) -> ModelProto:
    """The graph, each of its nodes with a name of its own."""
    model = graph.join(checkpoint)
    name_nodes_(model)
    return model


def _options(work: Survey, weight: PlannedWeight) -> Iterator[Option]:
    for one in work.curves[weight.name]:
        yield Option(one.cost.bytes, one.disagreement)
    yield Option(work.cost(weight.name, None).bytes, 0.0)


def _uniform(work: Survey, candidate: Candidate) -> PlanPoint:
    """All weights in one form; where its groups do not fit, with a scale per channel."""
    choice = _same(work.weights, candidate)
    return PlanPoint(
        label=str(candidate),
        coded_bytes=work.coded(choice),
        disagreement=work.fed.disagreement(work.dequantized(choice)),
        predicted_disagreement=None,
    )


def _same(weights: Mapping[str, PlannedWeight], candidate: Candidate) -> Choice:
    own = Candidate(candidate.num_bits, "channel")
    return {name: candidate if candidate in one.candidates else own for name, one in weights.items()}


def _point(work: Survey, solutions: Chain, position: int, judge: Judge) -> PlanPoint:
    made = work.build(work.choice(solutions, position))
    return PlanPoint(
        label=f"plan {position} of {len(solutions.moves)}",
        coded_bytes=coded_bytes(made, work.compression),
        disagreement=judge.disagreement(made),
        predicted_disagreement=solutions.errors[position],
    )


def _places(solutions: Chain, chosen: int, points: int) -> list[int]:
    """The chosen solution, and others over the bytes between the least and the most, evenly."""
    if not points:
        return []
    last = len(solutions.moves)
    first = min(next((at for at, error in enumerate(solutions.errors) if error > 0), last), chosen)
    most, least = solutions.sizes[first], solutions.sizes[last]
    wanted = [most + (least - most) * part / max(points - 2, 1) for part in range(points - 1)]
    nearest = {min(range(first, last + 1), key=lambda at: abs(solutions.sizes[at] - size)) for size in wanted}
    return sorted(nearest | {chosen})


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
                num_bits=candidate.num_bits if candidate else None,
                scale=candidate.scale if candidate else None,
                coded_bytes=cost.coded,
                inline_bytes=cost.inline,
                disagreement=taken.disagreement if taken else 0.0,
                is_measured=taken.is_measured if taken else True,
                measurements=sum(one.is_measured for one in curve),
                law_holds=any(not one.is_measured for one in curve),
            )
        )
    return rows


def _calibration(workload: Workload) -> list[Inputs]:
    batches: list[Inputs] = [batch.inputs for batch in workload.batches("calibration", BATCH)]
    samples = sum(len(next(iter(batch.values()))) for batch in batches)
    if samples < LEAST_SAMPLES:
        raise WorkloadError(
            "planning on calibration data",
            found=f"{samples} samples",
            expected=f"at least {LEAST_SAMPLES}",
            fix="raise workload.calibration_samples",
        )
    return batches


def _some(batches: Sequence[Inputs], samples: int) -> list[Inputs]:
    """So many samples or a few more, in whole batches from the whole split, as a split may be in some order."""
    wanted = min(-(-samples // BATCH), len(batches))
    return [batches[len(batches) * part // wanted] for part in range(wanted)]
