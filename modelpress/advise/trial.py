"""Techniques tried in small: the line's own stages on a part of the calibration data, without their searches.

What comes out has the shapes, the codes and about the quality of what a run of the line would make. It is neither
evaluated nor timed: bytes are those of the real codecs on it, quality is that on held calibration samples, and times
are foretold from its products.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field

from torch import nn

from modelpress import graph
from modelpress.advise import graphs, held
from modelpress.advise.grid import Candidate
from modelpress.advise.outlook import Found, Plans
from modelpress.advise.packing import weigh
from modelpress.advise.work import Kernel, Speeds, alike
from modelpress.agreement import Inputs
from modelpress.checkpoint import Checkpoint
from modelpress.config import AdviseRecipe, CompressConfig, OptimizeConfig, PlanConfig, QuantizeConfig
from modelpress.distill import distill
from modelpress.errors import BudgetExceededError, CoverageError
from modelpress.export import export
from modelpress.plan import kernels as plan_kernels
from modelpress.plan.search import fill, furthest
from modelpress.plan.smallest import survey
from modelpress.plan.solver import chain
from modelpress.plan.survey import Survey
from modelpress.progress import silent
from modelpress.prune import prune_
from modelpress.quantize import static
from modelpress.quantize.build import builder
from modelpress.quantize.from_module import quantize_module
from modelpress.quantize.rewrite import name_nodes_
from modelpress.quantize.selection import chosen_layers, eligible_layers
from modelpress.reports import Predicted, Prediction
from modelpress.scores import Scored
from modelpress.workload import Workload

UNSEARCHED = 1e9
"""A stage's own budget while it is tried: the whole graph takes the form, and what that costs is measured."""


@dataclass(frozen=True)
class Trial(Found):
    """What trying a candidate gave."""

    coded_bytes: int
    """Of its tensors, losslessly coded."""
    evidence: list[str] = field(default_factory=list)
    """What was found on the way."""


@dataclass(frozen=True)
class _Made:
    """A graph that was made of the model."""

    checkpoint: Checkpoint
    exported: Checkpoint
    """The float graph that it was made from."""
    kernels: dict[str, Kernel]
    """Of its products that are not computed in float, by weight: what stages fuse keeps its weights' names."""
    answers: held.Answers
    quality_drop: Prediction
    evidence: tuple[str, ...] = ()


class Trials:
    """Tries candidates on one model; what several of them share is made once.

    Args:
        recipe: what is asked.
        workload: its workload.
        source: the trained module.
        speeds: of single products: a plan for seconds takes the fastest kernels.
    """

    def __init__(self, recipe: AdviseRecipe, workload: Workload, source: nn.Module, speeds: Speeds) -> None:
        self.recipe, self.workload, self.source, self.speeds = recipe, workload, source, speeds
        self.parts = held.cut(workload)
        self.batches: dict[int, Inputs] = {size: workload.example(size) for size in (1, recipe.advise.batch_size)}
        self.exported = export(source, workload, recipe.export)[0]
        self.expected = held.answers(self.exported, self.parts)
        self._bases: dict[str, tuple[nn.Module, Checkpoint]] = {"{}": (source, self.exported)}
        self._surveys: dict[str, Survey] = {}
        self._products: dict[int, dict[int, list[graphs.Product]]] = {}

    def now(self) -> Trial:
        """The source model in float, every tensor raw."""
        nothing = Predicted(value=0, low=0, high=0, by="it is the source")
        config = Candidate("lossless", "now").config(self.recipe)
        return self._trial(_Made(self.exported, self.exported, {}, self.expected, nothing), config, None, 0.0)

    def run(self, candidate: Candidate, error: float) -> Trial:
        """Try one.

        Args:
            candidate: of the grid.
            error: how far off foretold bytes are known to be, as a share.

        Raises:
            ModelpressError: a stage refuses the model; the reason is the technique's.
        """
        config = candidate.config(self.recipe)
        base, module, exported = self._base(config)
        made, kernels = exported, dict[str, Kernel]()
        if config.plan is not None and config.plan.objective == "bytes":
            made = self._planned_bytes(base, exported, config.plan)
        elif config.plan is not None:
            made, kernels = self._planned_seconds(exported, config.plan)
        elif config.quantize is not None:
            made, kernels = self._quantized(module, exported, config.quantize)
        found = held.answers(made, self.parts)
        drop = held.quality_drop(found, self.expected, self.parts)
        away = held.disagreement(found, self.expected, self.workload)
        if config.plan is not None and away > config.plan.max_disagreement and kernels:
            raise BudgetExceededError(
                "planning for seconds",
                found=f"a disagreement of {away:.3g} with each product by its fastest kernel",
                expected=f"at most plan.max_disagreement, {config.plan.max_disagreement:g}: which products "
                "stay in float is not known before the plan is made",
            )
        said = f"disagreement with the source {away:.3g} on {self.parts.samples} held calibration samples"
        one = _Made(made, exported, kernels, found, drop, (said,))
        return self._trial(one, config, self.recipe.compress, error)

    def _base(self, config: OptimizeConfig) -> tuple[str, nn.Module, Checkpoint]:
        """The module that is quantized, and its graph; its key first."""
        given = {name: getattr(config, name) for name in ("distill", "prune")}
        key = json.dumps({name: one.model_dump(mode="json") for name, one in given.items() if one}, sort_keys=True)
        if key not in self._bases:
            module = copy.deepcopy(self.source)
            if config.distill:
                module, _ = distill(module, self.parts.fitting, config.distill, silent)
            if config.prune:
                prune_(module, self.parts.fitting, config.prune, silent)
            self._bases[key] = module, export(module, self.workload, self.recipe.export)[0]
        return key, *self._bases[key]

    def _quantized(
        self, module: nn.Module, exported: Checkpoint, config: QuantizeConfig
    ) -> tuple[Checkpoint, dict[str, Kernel]]:
        """All that the method can take as integers, and the kernels by node."""
        config = config.model_copy(update={"max_quality_drop": UNSEARCHED, "min_coverage": 0.0})
        if config.needs_module:
            made, _ = quantize_module(module, exported, self.parts.fitting, config, self.recipe.export, silent)
            return made, {}
        model = graph.join(exported)
        if config.method == "static":
            model = static.prepare(model)
        name_nodes_(model)
        chosen = chosen_layers(eligible_layers(model, config.embeddings), config)
        batches = [batch.inputs for batch in self.parts.fitting.batches("calibration", held.BATCH)]
        made = graph.split(builder(model, chosen, batches, config, silent)([layer.node for layer in chosen], []))
        kernel = kernel_of(config)
        return made, {layer.weight: kernel for layer in chosen if layer.op_type != "Gather"}

    def _planned_seconds(self, exported: Checkpoint, config: PlanConfig) -> tuple[Checkpoint, dict[str, Kernel]]:
        """Each product by its fastest kernel; what a plan for seconds would take if the budget let it."""
        model = graphs.named(exported)
        planned = plan_kernels.products(model, config)
        size = min(self.batches, key=lambda one: abs(one - config.batch_size))
        works = {one.node: one.work for one in graphs.products(model, self.batches[size])}
        among = alike([(work, "float") for work in works.values()])
        names: dict[Kernel, plan_kernels.Kernel] = {}
        for one in plan_kernels.offered(config):
            names["dynamic" if one.group_size is None else _nbits(one.num_bits)] = one
        choice, kernels = {}, dict[str, Kernel]()
        for product in planned:
            work = works[product.nodes[0]]
            offered: list[Kernel] = ["float", *names]
            times = {one: self.speeds.seconds(work, one, among[work]) for one in offered}
            fastest = min(times, key=lambda one: _ends(times[one])[1])
            if _ends(times[fastest])[1] < _ends(times["float"])[0]:  # not by what two measurements differ in
                choice[product.weight] = names[fastest]
                kernels[product.weight] = fastest
        if not kernels:
            raise CoverageError(
                "planning for seconds",
                found=f"none of {', '.join(names)} faster than float for any of {len(planned)} products, by itself",
            )
        return graph.split(plan_kernels.Builder(model, planned).build(choice)), kernels

    def _planned_bytes(self, base: str, exported: Checkpoint, config: PlanConfig) -> Checkpoint:
        """The plan's own survey on the fitting part, which all budgets share, and its own search."""
        if base not in self._surveys:
            self._surveys[base] = survey(exported, self.parts.fitting, config, self.recipe.compress, silent)
        known = self._surveys[base]
        options = known.options()
        solutions = chain(options)
        unchanged = tuple(len(one) - 1 for one in options)

        def measured(chosen: tuple[int, ...]) -> float:
            return known.disagreement(known.choice(chosen))

        position = furthest(solutions, measured, config.max_disagreement, unchanged)
        filled = fill(options, solutions.choice(position), measured, config.max_disagreement)
        return known.build(known.choice(filled))

    def _plans(self, exported: Checkpoint, kernels: dict[str, Kernel]) -> Plans:
        """The products of a float graph, one of those that are kept, each with its kernel."""
        if id(exported) not in self._products:
            model = graphs.named(exported)
            self._products[id(exported)] = {
                size: graphs.products(model, inputs) for size, inputs in self.batches.items()
            }
        return {size: graphs.plan(found, kernels) for size, found in self._products[id(exported)].items()}

    def _trial(self, one: _Made, config: OptimizeConfig, compression: CompressConfig | None, error: float) -> Trial:
        """What is known of a graph."""
        scores = one.answers.scores, self.expected.scores
        judged = None
        if scores[0] is not None and scores[1] is not None:
            judged = self._scored(scores[0]), self._scored(scores[1])
        packed = weigh(one.checkpoint, self.workload, config, compression, judged)
        total = packed.published_bytes
        others = total - packed.shards_bytes
        # What is computed in float is made floats again when the graph is loaded, however it is stored.
        loaded = one.checkpoint if one.kernels else one.exported
        return Trial(
            plans=self._plans(one.exported, one.kernels),
            published_bytes=Predicted(
                value=total,
                low=total * (1 - error),
                high=total * (1 + error),
                by=f"a pack was made: {packed.shards_bytes:,} of shards, {others:,} of graph, files and manifest",
            ),
            coded_bytes=packed.coding.stored_bytes,
            weights_bytes=float(sum(tensor.nbytes for tensor in loaded.tensors.values())),
            decode_seconds=sum(tensor.decode_seconds or 0.0 for tensor in packed.coding.tensors),
            quality_drop=one.quality_drop,
            evidence=list(one.evidence),
        )

    def _scored(self, found: held.Scores) -> Scored:
        """Held scores in the place of the evaluation split's."""
        return Scored(found, "0" * 64, self.workload.metric)


def kernel_of(config: QuantizeConfig) -> Kernel:
    """How the products that a method takes are computed."""
    if config.method in ("dynamic", "static"):
        return "dynamic" if config.method == "dynamic" else "static"
    if config.method == "codebook" or config.algorithm == "fp8":
        return "float"  # ONNX Runtime makes floats of them as it loads the graph
    return _nbits(config.num_bits)


def _nbits(bits: int) -> Kernel:
    return "nbits-8" if bits == 8 else "nbits-4"


def _ends(found: Prediction) -> tuple[float, float]:
    return (found.low, found.high) if isinstance(found, Predicted) else (float("inf"), float("inf"))
