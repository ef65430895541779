"""Training of a planned model: its weights learn while they are rounded to the forms that the plan gave them.

The gradient passes through the rounding as if it were not there (Bengio et al. 2013, arXiv:1308.3432); scales follow
the weights, and zeros stay. The plan itself is not made again: what it saves in bytes it keeps, all but for what the
codes' new distribution costs, and what it costs in agreement becomes less.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from onnx import ModelProto
from torch import Tensor, nn
from torch.func import functional_call

from modelpress import graph
from modelpress.agreement import Judge, divergence
from modelpress.checkpoint import Checkpoint
from modelpress.config import CompressConfig, ExportConfig, PlanConfig
from modelpress.errors import BudgetExceededError, ConfigError, StageError
from modelpress.export import export
from modelpress.plan import held_out
from modelpress.plan.candidates import HALF, Candidate, Floats, layout
from modelpress.plan.costs import Cost, coded_bytes, coding_cost, file_bytes
from modelpress.plan.data import named
from modelpress.plan.rewrite import stored_weights
from modelpress.plan.smallest import settle, survey
from modelpress.plan.survey import Choice, Survey
from modelpress.plan.tensors import PlannedWeight, planned_weights
from modelpress.progress import Progress, silent
from modelpress.prune.recovery import recover_
from modelpress.quantize.from_module import fold_norms_
from modelpress.reports import PlannedTensor, PlanReport
from modelpress.workload import Workload

HIDDEN_WEIGHT = 1.0
"""Of the hidden states' difference beside the outputs', as after pruning."""


class Place(NamedTuple):
    """Where a weight of the graph stands in the module."""

    parameter: str
    """Its name."""
    transposed: bool
    """Whether the graph has the parameter's transpose."""


@dataclass(frozen=True)
class Rounding:
    """How a parameter is rounded."""

    candidate: Candidate
    """The form."""
    transposed: bool
    """Whether the graph has the parameter's transpose."""
    channel_axis: int
    """Of the weight in the graph."""
    zeros: Tensor
    """Where the parameter is zero and stays so, bool."""

    def __call__(self, parameter: Tensor) -> Tensor:
        """The parameter as its codes stand for it; its gradient is that of the parameter."""
        weight = parameter.t() if self.transposed else parameter
        rounded = round_weight(weight.detach(), self.candidate, self.channel_axis)
        return parameter + ((rounded.t() if self.transposed else rounded) - parameter).detach()


class Rounded(nn.Module):
    """A module that runs on some of its parameters rounded."""

    def __init__(self, module: nn.Module, roundings: Mapping[str, Rounding]) -> None:
        super().__init__()
        self.module, self.roundings = module, dict(roundings)

    def forward(self, **inputs: Tensor) -> Tensor:
        """What the module answers."""
        changed = {name: rounding(self.module.get_parameter(name)) for name, rounding in self.roundings.items()}
        return torch.as_tensor(functional_call(self.module, changed, kwargs=inputs, tie_weights=True))

    def hold(self) -> None:
        """Put the zeros back."""
        with torch.no_grad():
            for name, rounding in self.roundings.items():
                parameter = self.module.get_parameter(name)
                parameter.masked_fill_(rounding.zeros.to(parameter.device), 0.0)


def round_weight(weight: Tensor, candidate: Candidate, channel_axis: int) -> Tensor:
    """`candidates.encode(...).dequantize()` of a float32 weight that has its zeros, to the bit, where it lies."""
    grouped, shared = layout(tuple(weight.shape), candidate.scale, channel_axis)
    values = weight.reshape(grouped)
    largest = values.abs().amax(dim=shared, keepdim=True) if shared else values.abs().amax()
    scale = largest / candidate.largest_code
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    if scale.min() >= float(HALF.tiny) and scale.max() <= float(HALF.max):
        scale = scale.half().float()
    codes = torch.clamp(torch.round(values / scale), -candidate.largest_code, candidate.largest_code)
    return (codes * scale).reshape(weight.shape)


def plan_module(
    module: nn.Module,
    checkpoint: Checkpoint,
    workload: Workload,
    config: PlanConfig,
    export_config: ExportConfig,
    compression: CompressConfig | None = None,
    progress: Progress = silent,
) -> tuple[Checkpoint, PlanReport]:
    """Plan the graph of `module` for the fewest bytes, train a copy of the module within the plan, and store that.

    The budget holds before the training and after it. What the report says of the planned graph as a whole,
    of bytes and of held-out data is measured after it. The front, the uniform settings and the disagreements of single
    tensors are untrained.

    Args:
        module: as it was exported; it stays as it is.
        checkpoint: its float graph, the teacher's and the one that all is compared with.
        workload: data and metric.
        config: with a `recovery`.
        export_config: how the float graph was exported.
        compression: how the pack will be coded; None: every tensor raw.
        progress: told of each measurement, and of the training.

    Raises:
        BudgetExceededError: the training took the model out of the budget.
        ConfigError: no recovery.
        ExportError: see `export`.
        StageError: a planned weight that is none of the module's parameters, or two alike; or a failed training.
        And all that `modelpress.plan.plan` raises.
    """
    if config.recovery is None:
        raise ConfigError(
            "training a planned module",
            found="no plan.recovery",
            expected="how it is to be trained",
            fix="call modelpress.plan.plan with the graph",
        )
    copied = copy.deepcopy(module).eval()
    # Weights are planned as they will be stored: with the normalisations in them.
    source = export(copied, workload, export_config)[0] if fold_norms_(copied, workload) else checkpoint
    places = _places(copied, planned_weights(named(source), config))
    work = survey(source, workload, config, compression, progress)
    _, untrained = settle(work, config.max_disagreement, progress)
    choice = {row.name: form for row in untrained.tensors if (form := _form(row)) is not None}
    student = Rounded(
        copied,
        {places[name].parameter: _rounding(work.weights[name], form, places[name]) for name, form in choice.items()},
    )
    student.hold()
    training, _ = recover_(
        copied, module, workload, config.recovery, HIDDEN_WEIGHT, student.hold, progress, trained=student
    )
    made, sizes = _stored(work, named(export(copied, workload, export_config)[0]), choice)
    judge = Judge(checkpoint, work.calibration, partial(divergence, outputs=workload.outputs))
    verdict = held_out.compare(checkpoint, made, workload)
    found = judge.disagreement(made)
    progress(1, 1, f"disagreement {found:.3g}, {untrained.disagreement:.3g} before the training")
    if found > config.max_disagreement:
        raise BudgetExceededError(
            "training within a plan",
            found=f"disagreement {found:.3g} on calibration data, {untrained.disagreement:.3g} before the training",
            expected=f"at most plan.max_disagreement, {config.max_disagreement:.3g}",
            fix="lower plan.recovery.learning_rate, or leave plan.recovery out",
        )
    return made, untrained.model_copy(
        update={
            "disagreement": found,
            "untrained_disagreement": untrained.disagreement,
            "coded_bytes": coded_bytes(made, compression),
            "file_bytes": file_bytes(made),
            "tensors": [
                row.model_copy(update={"coded_bytes": sizes[row.name].coded, "inline_bytes": sizes[row.name].inline})
                if row.name in sizes
                else row
                for row in untrained.tensors
            ],
            "held_out_disagreement": verdict.disagreement,
            "quality": verdict.quality,
            "recovery": training,
        }
    )


def _form(row: PlannedTensor) -> Candidate | None:
    if row.num_bits is None or row.scale is None:
        return None
    return Candidate(row.num_bits, row.scale, row.sparsity or 0.0)


def _rounding(weight: PlannedWeight, form: Candidate, place: Place) -> Rounding:
    zeros = torch.from_numpy(weight.zeros(form))
    return Rounding(form, place.transposed, weight.channel_axis, zeros.t() if place.transposed else zeros)


def _places(module: nn.Module, weights: Sequence[PlannedWeight]) -> dict[str, Place]:
    """The parameter behind each weight; they are told by their values.

    Raises:
        StageError: a weight that is none of the module's parameters, or that two of them equal.
    """
    known: dict[tuple[tuple[int, ...], str], dict[str, Place]] = {}
    for name, parameter in module.named_parameters():
        values = parameter.detach().cpu().numpy()
        known.setdefault(_identity(values), {}).setdefault(name, Place(name, False))
        if values.ndim == 2:
            known.setdefault(_identity(values.T), {}).setdefault(name, Place(name, True))
    places = {}
    for weight in weights:
        found = known.get(_identity(weight.values), {})
        if len(found) > 1:
            raise StageError(
                f"training the planned weight {weight.name!r}",
                found=f"parameters of equal values: {', '.join(found)}",
                expected="one parameter, or one that modules share",
                fix=f"tie them, or name its node in plan.ignore: {', '.join(weight.nodes)}",
            )
        if not found:
            raise StageError(
                f"training the planned weight {weight.name!r}",
                found=f"no parameter of the module with its {weight.values.size} values",
                expected="a weight that the export took over as it is, or transposed",
                fix=f"name its node in plan.ignore: {', '.join(weight.nodes)}",
            )
        (places[weight.name],) = found.values()
    return places


def _identity(values: Floats) -> tuple[tuple[int, ...], str]:
    return values.shape, hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _stored(work: Survey, model: ModelProto, choice: Choice) -> tuple[Checkpoint, dict[str, Cost]]:
    """The trained graph in the forms of the plan, and what its weights cost."""
    trained = {one.name: one.values for one in planned_weights(model, work.config)}
    if missing := sorted(set(choice) - set(trained)):
        raise StageError(
            "storing a trained plan",
            found=f"no weight {', '.join(missing)} in the graph of the trained module",
            expected="the same weights as before the training",
            fix="name their nodes in plan.ignore; this is worth a report",
        )
    weights = {name: replace(work.weights[name], values=trained[name]) for name in choice}
    made = graph.split(stored_weights(model, choice, weights))
    costs = {name: coding_cost(one, one.encode(choice[name]), work.compression) for name, one in weights.items()}
    return Checkpoint("onnx", made.tensors, work.checkpoint.files | made.files, work.checkpoint.metadata), costs
