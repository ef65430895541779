"""What is known of a graph's weights before a budget is: each by itself, in every form, and all of them alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from onnx import ModelProto

from modelpress import graph
from modelpress.agreement import Inputs, Judge, divergence
from modelpress.checkpoint import Checkpoint
from modelpress.config import CompressConfig, PlanConfig
from modelpress.plan.candidates import Candidate, Floats
from modelpress.plan.costs import Cost, coded_bytes, coding_cost, float_cost
from modelpress.plan.data import some
from modelpress.plan.fed import FedWeights
from modelpress.plan.rewrite import stored_weights
from modelpress.plan.sensitivity import Measured
from modelpress.plan.solver import Option
from modelpress.plan.tensors import PlannedWeight
from modelpress.reports import PlanPoint
from modelpress.workload import Workload

Choice = dict[str, Candidate]
"""What each weight becomes; one that is not in it stays in float."""
Figures = tuple[int, float]
"""Coded bytes, and disagreement."""


@dataclass
class Survey:
    """What is known of a graph's weights before a budget is."""

    checkpoint: Checkpoint
    """The float one."""
    workload: Workload
    """Its data."""
    config: PlanConfig
    """What may be chosen."""
    compression: CompressConfig | None
    """How bytes are counted."""
    model: ModelProto
    """The checkpoint's graph."""
    weights: dict[str, PlannedWeight]
    """What is planned, by name."""
    calibration: list[Inputs]
    """Batches that whole plans are measured on."""
    curves: dict[str, list[Measured]] = field(default_factory=dict)
    """Of each weight, its candidates."""
    uniform: list[PlanPoint] = field(default_factory=list)
    """All weights in one form."""
    known_alike: dict[str, float] = field(default_factory=dict)
    """By form, the disagreement with all weights in it, where another process measured it."""
    known_floats: dict[str, Cost] = field(default_factory=dict)
    """By weight, what it costs in float, where another process has coded it."""
    _costs: dict[tuple[str, Candidate | None], Cost] = field(default_factory=dict)
    _rest: int | None = None
    _values: dict[str, tuple[Candidate, Floats]] = field(default_factory=dict)
    """Of each weight, the form that was asked for last: one plan differs from the next in a few weights."""

    @cached_property
    def fed(self) -> FedWeights:
        """Measures whole plans."""
        return self._fed(self.calibration)

    @cached_property
    def few(self) -> FedWeights:
        """Measures single weights."""
        return self._fed(some(self.calibration, self.config.sensitivity_samples))

    def _fed(self, batches: list[Inputs]) -> FedWeights:
        values = {one.name: one.values for one in self.weights.values()}
        return FedWeights(self.model, values, batches, self.workload.outputs)

    @property
    def settings(self) -> list[Candidate]:
        """What all weights may be alike, those without zeros of their own first."""
        config = self.config
        return [
            Candidate(bits, scale, sparsity)
            for sparsity in sorted(config.sparsity)
            for scale in config.sharing
            for bits in config.num_bits
        ]

    @property
    def steps(self) -> int:
        """Of the progress bar."""
        return len(self.weights) + len(self.settings) + self.config.points + 2

    def cost(self, name: str, candidate: Candidate | None) -> Cost:
        """Of a weight as a candidate, or in float."""
        key = (name, candidate)
        if key not in self._costs:
            weight = self.weights[name]
            known = next((one.cost for one in self.curves[name] if one.candidate == candidate), None)
            if candidate is None:
                known = self.known_floats.get(name) or float_cost(weight, self.compression)
            elif known is None:
                known = coding_cost(weight, weight.encode(candidate), self.compression)
            self._costs[key] = known
        return self._costs[key]

    def coded(self, choice: Choice) -> int:
        """What all tensors of a choice take when they are coded."""
        if self._rest is None:
            others = {name: one for name, one in self.checkpoint.tensors.items() if name not in self.weights}
            self._rest = coded_bytes(Checkpoint("onnx", others), self.compression)
        return self._rest + sum(self.cost(name, choice.get(name)).coded for name in self.weights)

    def options(self) -> list[list[Option]]:
        """Of each weight, its candidates; the last option is to stay in float."""
        return [
            [
                *(Option(one.cost.bytes, one.disagreement) for one in self.curves[name]),
                Option(self.cost(name, None).bytes, 0.0),
            ]
            for name in self.weights
        ]

    def without_zeros(self, options: Sequence[Sequence[Option]]) -> list[list[Option]]:
        """The same where forms with zeros of their own are worse than staying in float, and so never taken."""
        made = []
        for weight, of in zip(self.weights.values(), options, strict=True):
            worse = of[-1]._replace(cost=of[-1].cost + 1)
            forms = zip(weight.candidates, of[:-1], strict=True)
            made.append([*(worse if one.sparsity else option for one, option in forms), of[-1]])
        return made

    def choice(self, options: Sequence[int]) -> Choice:
        """The candidates that options stand for."""
        return {
            name: weight.candidates[option]
            for (name, weight), option in zip(self.weights.items(), options, strict=True)
            if option < len(weight.candidates)
        }

    def alike(self, candidate: Candidate) -> Choice:
        """All weights in one form; where its groups do not fit, with a scale per channel."""
        own = replace(candidate, scale="channel")
        return {name: candidate if candidate in one.candidates else own for name, one in self.weights.items()}

    def foretold(self, choice: Choice) -> float | None:
        """What the disagreements of single weights add up to; None where one is of no candidate."""
        known = {name: {one.candidate: one.disagreement for one in curve} for name, curve in self.curves.items()}
        if any(candidate not in known[name] for name, candidate in choice.items()):
            return None
        return sum(known[name][candidate] for name, candidate in choice.items())

    def disagreement(self, choice: Choice) -> float:
        """Of a choice, measured on the whole calibration split."""
        return self.fed.disagreement(self.dequantized(choice))

    def disagreement_alike(self, candidate: Candidate) -> float:
        """Of all weights in one form, measured here unless it is known."""
        known = self.known_alike.get(str(candidate))
        return self.disagreement(self.alike(candidate)) if known is None else known

    def dequantized(self, choice: Choice) -> dict[str, Floats]:
        """The weights that a choice stands for."""
        for name, candidate in choice.items():
            if name not in self._values or self._values[name][0] != candidate:
                self._values[name] = candidate, self.weights[name].encode(candidate).dequantize()
        return {name: self._values[name][1] for name in choice}

    @cached_property
    def judge(self) -> Judge:
        """Compares whole checkpoints with the float one, on the calibration data."""
        return Judge(self.checkpoint, self.calibration, partial(divergence, outputs=self.workload.outputs))

    def figures(self, options: Sequence[int]) -> Figures:
        """Coded bytes and disagreement of the checkpoint that options make."""
        made = self.build(self.choice(options))
        return coded_bytes(made, self.compression), self.judge.disagreement(made)

    def build(self, choice: Choice) -> Checkpoint:
        """The checkpoint of a choice."""
        made = graph.split(stored_weights(self.model, choice, self.weights))
        return Checkpoint("onnx", made.tensors, self.checkpoint.files | made.files, self.checkpoint.metadata)
