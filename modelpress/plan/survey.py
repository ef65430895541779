"""What is known of a graph's weights before a budget is: each by itself, in every form, and all of them alike."""

from __future__ import annotations

from dataclasses import dataclass, field

from onnx import ModelProto

from modelpress import graph
from modelpress.checkpoint import Checkpoint
from modelpress.config import CompressConfig, PlanConfig
from modelpress.plan.candidates import Candidate, Floats, encode
from modelpress.plan.costs import Cost, coded_bytes, coding_cost, float_cost
from modelpress.plan.judge import FedWeights, Inputs
from modelpress.plan.rewrite import stored_weights
from modelpress.plan.sensitivity import Measured
from modelpress.plan.solver import Chain
from modelpress.plan.tensors import PlannedWeight
from modelpress.reports import PlanPoint
from modelpress.workload import Workload

Choice = dict[str, Candidate]
"""What each weight becomes; one that is not in it stays in float."""


@dataclass
class Survey:
    """What is known of a graph's weights before a budget is."""

    checkpoint: Checkpoint
    """The float one."""
    workload: Workload
    """Its data."""
    config: PlanConfig
    """What may be chosen."""
    compression: CompressConfig
    """How bytes are counted."""
    model: ModelProto
    """The checkpoint's graph."""
    weights: dict[str, PlannedWeight]
    """What is planned, by name."""
    calibration: list[Inputs]
    """Batches that whole plans are measured on."""
    fed: FedWeights
    """Measures them."""
    curves: dict[str, list[Measured]] = field(default_factory=dict)
    """Of each weight, its candidates."""
    uniform: list[PlanPoint] = field(default_factory=list)
    """All weights in one form."""
    _costs: dict[tuple[str, Candidate | None], Cost] = field(default_factory=dict)
    _rest: int | None = None

    @property
    def steps(self) -> int:
        """Of the progress bar."""
        return len(self.weights) + len(self.config.num_bits) * len(self.config.scales) + self.config.points + 2

    def cost(self, name: str, candidate: Candidate | None) -> Cost:
        """Of a weight as a candidate, or in float."""
        key = (name, candidate)
        if key not in self._costs:
            weight = self.weights[name]
            known = next((one.cost for one in self.curves[name] if one.candidate == candidate), None)
            if candidate is None:
                known = float_cost(weight, self.compression)
            elif known is None:
                known = coding_cost(weight, encode(weight.values, candidate, weight.channel_axis), self.compression)
            self._costs[key] = known
        return self._costs[key]

    def coded(self, choice: Choice) -> int:
        """What all tensors of a choice take when they are coded."""
        if self._rest is None:
            others = {name: one for name, one in self.checkpoint.tensors.items() if name not in self.weights}
            self._rest = coded_bytes(Checkpoint("onnx", others), self.compression)
        return self._rest + sum(self.cost(name, choice.get(name)).coded for name in self.weights)

    def choice(self, solutions: Chain, position: int) -> Choice:
        """The candidates of a solution; the last option of each weight is to stay in float."""
        chosen = {}
        for (name, weight), option in zip(self.weights.items(), solutions.choice(position), strict=True):
            if option < len(weight.candidates):
                chosen[name] = weight.candidates[option]
        return chosen

    def dequantized(self, choice: Choice) -> dict[str, Floats]:
        """The weights that a choice stands for."""
        weights = {name: self.weights[name] for name in choice}
        return {name: encode(one.values, choice[name], one.channel_axis).dequantize() for name, one in weights.items()}

    def build(self, choice: Choice) -> Checkpoint:
        """The checkpoint of a choice."""
        made = graph.split(stored_weights(self.model, choice, self.weights))
        return Checkpoint("onnx", made.tensors, self.checkpoint.files | made.files, self.checkpoint.metadata)
