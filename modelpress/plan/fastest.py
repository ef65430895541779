"""The plan of least time: each product by the kernel with which all together stay within the budget.

What a kernel takes off a call is measured once for all products of a class (the operator and the shape of the weight):
all of them are changed at once, the graph is called in turns with the float one, and the share of its call that they
save is divided by their number: a share, as the machine may be slower in one measurement than in the next. What a
kernel costs in agreement is measured for each weight alone. Neither adds up exactly, so whole plans are measured: their
disagreement while the plan is searched, and the time of the one that was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from onnx import ModelProto, TensorProto, numpy_helper

from modelpress import graph
from modelpress.agreement import Judge, divergence
from modelpress.checkpoint import Checkpoint
from modelpress.config import CompressConfig, PlanConfig
from modelpress.errors import CoverageError, StageError
from modelpress.plan import held_out
from modelpress.plan.costs import coded_bytes, file_bytes
from modelpress.plan.data import calibration, named, samples, some
from modelpress.plan.kernels import Builder, Choice, Kernel, Product, offered, products
from modelpress.plan.latency import Clock, in_turns
from modelpress.plan.search import fill, furthest, spread
from modelpress.plan.solver import Option, chain, total
from modelpress.progress import Progress, silent
from modelpress.quantize.gelu import respell_gelu_
from modelpress.quantize.selection import eligible_layers
from modelpress.reports import PlannedTensor, PlanPoint, PlanReport
from modelpress.workload import Workload


@dataclass
class _Work:
    """What is known of the products of a graph."""

    source: Checkpoint
    model: ModelProto
    products: list[Product]
    builder: Builder
    judge: Judge
    clock: Clock
    compression: CompressConfig | None
    saved: dict[str, dict[Kernel, float]] = field(default_factory=dict)
    """By weight, the share of a call that a kernel takes off; only of those that take any off."""
    alone: dict[str, dict[Kernel, float]] = field(default_factory=dict)
    """By weight, the disagreement with a kernel for it alone."""

    def kernels(self, weight: str) -> list[Kernel]:
        return list(self.saved[weight])

    def choice(self, options: Sequence[int]) -> Choice:
        """The kernels that options stand for; the last option of each product is to stay in float."""
        pairs = zip(self.products, options, strict=True)
        return {
            one.weight: self.kernels(one.weight)[option]
            for one, option in pairs
            if option < len(self.saved[one.weight])
        }

    def options(self) -> list[list[Option]]:
        found = []
        for one in self.products:
            pairs = [(-saved, self.alone[one.weight][kernel]) for kernel, saved in self.saved[one.weight].items()]
            found.append([*(Option(seconds, error) for seconds, error in pairs), Option(0.0, 0.0)])
        return found

    def build(self, choice: Choice) -> Checkpoint:
        made = graph.split(self.builder.build(choice))
        return Checkpoint("onnx", made.tensors, self.source.files | made.files, self.source.metadata)

    def disagreement(self, choice: Choice) -> float:
        return self.judge.disagreement(self.build(choice))


def plan(
    checkpoint: Checkpoint,
    workload: Workload,
    config: PlanConfig,
    compression: CompressConfig | None,
    progress: Progress = silent,
    clock: Clock | None = None,
) -> tuple[Checkpoint, PlanReport]:
    """Plan a float ONNX checkpoint for time; it takes and raises what `modelpress.plan.plan` does, and

    Args:
        clock: seconds of a call to each of some checkpoints; None: `in_turns`, on `config.batch_size` samples.

    Raises:
        CoverageError: no product is faster by another kernel.
        StageError: the plan as a whole is measured to be no faster.
    """
    model = named(checkpoint)
    planned = products(model, config)
    batches = calibration(workload)
    respell_gelu_(model)
    distance = partial(divergence, outputs=workload.outputs)
    clock = clock or partial(in_turns, inputs=workload.example(config.batch_size), seconds=config.latency_seconds)
    source = graph.split(model)
    work = _Work(
        source=Checkpoint("onnx", source.tensors, checkpoint.files | source.files, checkpoint.metadata),
        model=model,
        products=planned,
        builder=Builder(model, planned),
        judge=Judge(source, batches, distance),
        clock=clock,
        compression=compression,
    )
    kernels = offered(config)
    steps = (len(planned) + len({one.alike for one in planned})) * len(kernels) + config.points + 3
    _time(work, kernels, progress, steps)
    few = Judge(source, some(batches, config.sensitivity_samples), distance)
    _sensitivities(work, few, kernels, progress, steps)
    choice, front, predicted = _search(work, config, progress, steps)
    return _judged(work, config, workload, choice, predicted, front, kernels, samples(batches), progress, steps)


def _time(work: _Work, kernels: Sequence[Kernel], progress: Progress, steps: int) -> None:
    """What each kernel takes off a call, for the products of each class together."""
    classes: dict[tuple[str, tuple[int, ...]], list[Product]] = {}
    for one in work.products:
        classes.setdefault(one.alike, []).append(one)
        work.saved[one.weight] = {}
    done = 0
    for (op_type, shape), members in classes.items():
        nodes = sum(len(one.nodes) for one in members)
        for kernel in kernels:
            progress(done, steps, f"time of {op_type} {'×'.join(map(str, shape))}: {kernel}")
            done += 1
            before, after = work.clock([work.source, work.build({one.weight: kernel for one in members})])
            if after < before:
                for one in members:
                    work.saved[one.weight][kernel] = (before - after) / before / nodes * len(one.nodes)
    if not any(work.saved.values()):
        raise CoverageError(
            "planning for time",
            found=f"none of {', '.join(map(str, kernels))} faster than float, for any of {len(work.products)} products",
            expected="one that is",
            fix="try another plan.batch_size, or leave the plan out",
        )


def _sensitivities(work: _Work, few: Judge, kernels: Sequence[Kernel], progress: Progress, steps: int) -> None:
    done = len({one.alike for one in work.products}) * len(kernels)
    for one in work.products:
        progress(done, steps, f"sensitivity of {', '.join(one.nodes)}")
        done += len(kernels)
        work.alone[one.weight] = {
            kernel: few.disagreement(work.build({one.weight: kernel})) for kernel in work.kernels(one.weight)
        }


def _search(work: _Work, config: PlanConfig, progress: Progress, steps: int) -> tuple[Choice, list[PlanPoint], float]:
    """The choice of least time within the budget, points of the front, and the share of a call that it should save."""
    options, tried = work.options(), dict[tuple[int, ...], float]()
    solutions = chain(options)

    def disagreement(chosen: tuple[int, ...]) -> float:
        if chosen not in tried:
            tried[chosen] = work.disagreement(work.choice(chosen))
            progress(steps - config.points - 3, steps, f"disagreement {tried[chosen]:.3g} of the whole plan")
        return tried[chosen]

    unchanged = tuple(len(one) - 1 for one in options)
    position = furthest(solutions, disagreement, config.max_disagreement, unchanged)
    chosen = fill(options, solutions.choice(position), disagreement, config.max_disagreement)
    front = []
    for done, place in enumerate(spread(solutions, position, config.points)):
        progress(steps - config.points - 2 + done, steps, "Pareto front")
        label = f"plan {place} of {len(solutions.moves)}"
        front.append(_point(work, label, work.choice(solutions.choice(place)), solutions.errors[place]))
    return work.choice(chosen), front, -total(options, chosen).cost


def _judged(
    work: _Work,
    config: PlanConfig,
    workload: Workload,
    choice: Choice,
    saved: float,
    front: list[PlanPoint],
    kernels: Sequence[Kernel],
    calibrated: int,
    progress: Progress,
    steps: int,
) -> tuple[Checkpoint, PlanReport]:
    """Measure the plan as a whole, and all products by one kernel beside it."""
    made = work.build(choice)
    progress(steps - 2, steps, "time of the plan")
    before, after = work.clock([work.source, made])
    if after >= before:
        raise StageError(
            "timing the planned graph",
            found=f"{after * 1000:.3f} ms a call, and {before * 1000:.3f} ms in float",
            expected=f"less: the kernels by themselves took {saved:.0%} off",
            fix="measure on a quiet machine with more plan.latency_seconds, or leave the plan out",
        )
    size, disagreement = coded_bytes(made, work.compression), work.disagreement(choice)
    foretold = sum(work.alone[weight][kernel] for weight, kernel in choice.items())
    own = PlanPoint(
        label="the plan",
        coded_bytes=size,
        seconds=after,
        disagreement=disagreement,
        predicted_disagreement=foretold,
    )
    uniform = [_point(work, str(kernel), {one.weight: kernel for one in work.products}, None) for kernel in kernels]
    progress(steps - 1, steps, "held-out data")
    verdict = held_out.compare(work.source, made, workload)
    progress(steps, steps, f"disagreement {disagreement:.3g}")
    eligible = sum({one.weight: one.elements for one in eligible_layers(work.model, True)}.values())
    changed = sum(one.layers[0].elements for one in work.products if one.weight in choice)
    return made, PlanReport(
        objective="seconds",
        divergence="kl" if workload.outputs == "logits" else "cosine",
        max_disagreement=config.max_disagreement,
        eligible_weights=eligible,
        planned_weights=changed,
        coverage=changed / eligible,
        calibration_samples=calibrated,
        predicted_disagreement=foretold,
        disagreement=disagreement,
        predicted_bytes=None,
        coded_bytes=size,
        file_bytes=file_bytes(made),
        float_bytes=coded_bytes(work.source, work.compression),
        predicted_seconds=before * (1 - saved),
        seconds=after,
        float_seconds=before,
        measurements=sum(map(len, work.alone.values())),
        tensors=_rows(work, made, choice, before),
        front=sorted([*front, own], key=lambda point: -(point.seconds or 0.0)) if config.points else [],
        uniform=uniform,
        held_out_disagreement=verdict.disagreement,
        quality=verdict.quality,
    )


def _point(work: _Work, label: str, choice: Choice, foretold: float | None) -> PlanPoint:
    made = work.build(choice)
    return PlanPoint(
        label=label,
        coded_bytes=coded_bytes(made, work.compression),
        seconds=work.clock([work.source, made])[1],
        disagreement=work.judge.disagreement(made),
        predicted_disagreement=foretold,
    )


def _rows(work: _Work, made: Checkpoint, choice: Choice, before: float) -> list[PlannedTensor]:
    inline = {
        one.name: numpy_helper.to_array(one).nbytes
        for one in graph.parse(made).graph.initializer
        if one.data_location != TensorProto.EXTERNAL
    }
    return [_row(work, made, inline, one, choice.get(one.weight), before) for one in work.products]


def _row(
    work: _Work, made: Checkpoint, inline: dict[str, int], one: Product, kernel: Kernel | None, before: float
) -> PlannedTensor:
    own = {name: tensor for name, tensor in made.tensors.items() if name.removesuffix("_scale") in _names(one)}
    return PlannedTensor(
        name=one.weight,
        nodes=list(one.nodes),
        shape=list(one.shape),
        form=str(kernel) if kernel else "float",
        num_bits=kernel.num_bits if kernel else None,
        scale=(kernel.group_size or "channel") if kernel else None,
        sparsity=0.0 if kernel else None,
        coded_bytes=coded_bytes(Checkpoint("onnx", own), work.compression) if own else 0,
        inline_bytes=sum(size for name, size in inline.items() if name.removesuffix("_scale") in _names(one)),
        disagreement=work.alone[one.weight][kernel] if kernel else 0.0,
        is_measured=True,
        seconds=before * work.saved[one.weight][kernel] if kernel else 0.0,
        measurements=len(work.alone[one.weight]),
        law_holds=False,
    )


def _names(one: Product) -> tuple[str, str]:
    """What a product's weight is called in float, and its codes."""
    return one.weight, f"{one.weight}_quantized"
