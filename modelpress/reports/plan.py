"""Reports of a plan."""

from __future__ import annotations

from typing import Literal

from modelpress.reports.base import Report
from modelpress.reports.module import TrainReport
from modelpress.reports.quality import QualityReport


class PlanOutline(Report):
    """A weight that a plan would look at."""

    name: str
    """Of the weight."""
    nodes: list[str]
    """Nodes that read it."""
    shape: list[int]
    """Its shape."""
    candidates: list[str]
    """What it may become beside staying in float."""
    least_measurements: int
    """Measurements that it takes: for bytes, where disagreement grows with the square of the rounding error; for
    seconds, where no kernel is faster than float. Else there are more, at most one for each candidate."""


class PlannedTensor(Report):
    """What a plan chose for one weight."""

    name: str
    """Of the weight in the float graph."""
    nodes: list[str]
    """Nodes that read it."""
    shape: list[int]
    """Its shape."""
    form: str
    """What it becomes, in words."""
    num_bits: int | None
    """Bits of its codes; None: it stays in float."""
    scale: Literal["tensor", "channel"] | int | None
    """What shares a scale; None: it stays in float."""
    sparsity: float | None
    """Fraction of its weights that became zero before rounding; None: it stays in float."""
    coded_bytes: int
    """Its codes and scales, losslessly coded."""
    inline_bytes: int
    """Those of them that are so small that they stay in the graph's file."""
    disagreement: float
    """Of the graph with this weight alone changed."""
    is_measured: bool
    """Or foretold from a coarser candidate's."""
    seconds: float | None = None
    """What that takes off a call, by the measurement of its class; None: not asked."""
    measurements: int
    """How many of its candidates were measured."""
    law_holds: bool
    """Whether disagreement was found to grow with the square of the rounding error, for one sharing of scales at
    least; where it was not, every candidate was measured."""


class PlanPoint(Report):
    """Bytes against disagreement of one choice for all weights."""

    label: str
    """What was chosen."""
    coded_bytes: int
    """All tensors, losslessly coded."""
    seconds: float | None = None
    """Of a call, measured; None: not asked."""
    disagreement: float
    """On calibration data, measured."""
    predicted_disagreement: float | None
    """What the single weights' add up to; None: not asked."""


class PlanReport(Report):
    """A plan: what was chosen, what was foretold of it and what was measured."""

    objective: Literal["bytes", "seconds"]
    """What was made least."""
    divergence: Literal["kl", "cosine"]
    """What disagreement means: mean Kullback-Leibler divergence in nats, or 1 − mean cosine."""
    max_disagreement: float
    """The budget."""
    eligible_weights: int
    """Weights in the operators that a plan can take, those of ignored nodes as well."""
    planned_weights: int
    """Weights that are integers now."""
    coverage: float
    """planned ÷ eligible."""
    calibration_samples: int
    """Samples that it was measured on."""
    predicted_disagreement: float
    """What the single weights' disagreements add up to."""
    disagreement: float
    """Of the planned graph, on calibration data."""
    untrained_disagreement: float | None = None
    """The same before `recovery`; None: there was none."""
    recovery: TrainReport | None = None
    """The training within the plan; None: there was none."""
    predicted_bytes: int | None
    """What the single weights' coded bytes, and those of all other tensors, add up to; None: not asked."""
    coded_bytes: int
    """All tensors of the planned checkpoint, losslessly coded."""
    unfilled_bytes: int | None = None
    """The same of the last Lagrangian solution within the budget, before what was left of it was spent; None: not
    asked."""
    file_bytes: int
    """The planned graph's file, as a pack stores it."""
    float_bytes: int
    """All tensors of the float checkpoint, losslessly coded."""
    predicted_seconds: float | None = None
    """Of a call: the float graph's less what the single kernels take off; None: not asked."""
    seconds: float | None = None
    """Of a call to the planned graph, measured: the fastest of many; None: not asked."""
    float_seconds: float | None = None
    """Of a call to the float graph, measured in turns with it; None: not asked."""
    measurements: int
    """Disagreements measured with a single weight changed."""
    tensors: list[PlannedTensor]
    """Each weight."""
    front: list[PlanPoint]
    """Other plans, each built, measured and coded."""
    uniform: list[PlanPoint]
    """The same bits and scales for all weights."""
    held_out_disagreement: float
    """Of the planned graph, on evaluation data."""
    quality: QualityReport
    """The workload's metric on evaluation data, paired with the float graph's."""
