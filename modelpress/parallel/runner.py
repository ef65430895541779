"""A rank of a data × pipeline × tensor mesh: its part of the model, and what runs it with the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from modelpress.errors import ConfigError, StageError
from modelpress.parallel.mesh import answered, average_gradients_, sum_gradients_
from modelpress.parallel.outline import Outline
from modelpress.parallel.pipeline import Stage
from modelpress.parallel.tensor import TensorPlan, parallelize_

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Schedule = Literal["gpipe", "1f1b"]
SCHEDULES: dict[Schedule, type[PipelineScheduleSingle]] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
"""GPipe (arXiv:1811.06965) runs all microbatches forward, then all backward; 1F1B (PipeDream-Flush, Narayanan et al.
2020, arXiv:2006.09503) takes turns, and keeps the activations of at most as many microbatches as there are stages."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""The mean over the samples of a microbatch's outputs and targets."""


class Runner:
    """What one rank holds and does; each rank makes one of the same arguments and calls the same methods.

    Args:
        module: the whole model, equal on all ranks; it may have meta tensors for `load_` to replace. It is not changed.
        outlined: its outline.
        bounds: of the pipeline's parts: as many as the mesh has stages.
        mesh: see `mesh.make_mesh`.
        names: the model's inputs; each has the samples on its first axis.
        plan: which layers are cut among the tensor-parallel ranks; needed where the mesh has several.
        microbatches: into how many parts each rank's batch is cut.
        loss: for training.
        schedule: see `SCHEDULES`.

    Raises:
        ConfigError: these do not fit together.
    """

    def __init__(
        self,
        module: nn.Module,
        outlined: Outline,
        bounds: Sequence[int],
        mesh: DeviceMesh,
        names: Sequence[str],
        *,
        plan: TensorPlan | None = None,
        microbatches: int = 1,
        loss: Loss | None = None,
        schedule: Schedule = "1f1b",
    ) -> None:
        self.mesh, self.plan = mesh, dict(plan or {})
        self.index = mesh.get_local_rank("pipeline")
        _check(bounds, mesh, self.plan, microbatches, schedule if loss is not None else "gpipe")
        self.stage = Stage(module, outlined, bounds, self.index, names)
        self._loss, self._microbatches, self._schedule = loss, microbatches, schedule
        self._made: dict[bool, tuple[object, PipelineScheduleSingle]] = {}
        self._tied = _tied(module, outlined, bounds)
        if mesh["tensor"].size() > 1:
            is_meta = any(parameter.is_meta for parameter in self.stage.parameters())
            with answered("cutting layers among tensor-parallel ranks"):
                parallelize_(self.stage.body, mesh["tensor"], self.plan, from_local=is_meta)

    def train_step(self, inputs: Mapping[str, Tensor], targets: Tensor) -> Tensor | None:
        """Forward and backward of this rank's slice of the batch: gradients are added to `stage.parameters()`, the mean
        over all copies' samples where the loss is a mean and all slices are equal.

        Args:
            inputs: (samples, …) each, of this rank's copy; all ranks of a copy are given the same.
            targets: (samples, …), read by the last stage.

        Returns:
            the mean loss over the copy's samples on the last stage; None on all others.

        Raises:
            ConfigError: no loss, or samples that the microbatches do not divide.
            StageError: another rank is gone.
        """
        if self._loss is None:
            raise ConfigError("training a pipeline", found="no loss", fix="give Runner a loss")
        losses: list[Tensor] = []
        with answered("running a training step"):
            self._run(inputs, targets, losses)
            self._exchange_tied_()
            summed = [one for name, one in self.stage.body.named_parameters() if self._is_summed(name)]
            sum_gradients_(summed, self.mesh["tensor"].get_group())
            average_gradients_(self.stage, self.mesh["data"].get_group())
        return torch.stack([loss.detach() for loss in losses]).mean() if self.stage.is_last else None

    def infer(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """The model's outputs for this rank's slice of the batch on the last stage; None on all others.

        Raises:
            ConfigError: samples that the microbatches do not divide.
            StageError: another rank is gone.
        """
        with answered("running the model"), torch.no_grad():
            found = self._run(inputs, None, None)
        return found if self.stage.is_last else None

    def _run(self, inputs: Mapping[str, Tensor], targets: Tensor | None, losses: list[Tensor] | None) -> Tensor | None:
        samples = {len(tensor) for tensor in inputs.values()}
        if len(samples) != 1 or samples.pop() % self._microbatches:
            raise ConfigError(
                f"cutting a batch into {self._microbatches} microbatches",
                found=", ".join(f"{name}: {len(tensor)} samples" for name, tensor in inputs.items()),
                expected=f"a multiple of {self._microbatches}, the same of each input",
            )
        schedule = self._scheduled(inputs, losses is not None)
        named: dict[str, Any] = dict(inputs)
        args = (named.pop(self.stage.names[0]),) if self.stage.is_first else ()
        if losses is None:
            found: Tensor | None = schedule.eval(*args, **named)
        else:
            found = schedule.step(*args, target=targets, losses=losses, return_outputs=False, **named)
        return found

    def _scheduled(self, inputs: Mapping[str, Tensor], training: bool) -> PipelineScheduleSingle:
        """The schedule for inputs of these shapes: a pipeline's buffers are made once for them."""
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in sorted(inputs.items()))
        made = self._made.get(training)
        if made is None or made[0] != shapes:
            made = shapes, self._schedule_for(inputs, training)
            self._made[training] = made
        return made[1]

    def _schedule_for(self, inputs: Mapping[str, Tensor], training: bool) -> PipelineScheduleSingle:
        # Shapes are told and not left to be found: else ranks send each other pickled ones, after a pass for nothing.
        microbatch = {name: tensor[: len(tensor) // self._microbatches] for name, tensor in inputs.items()}
        found = self.stage.hidden(microbatch)
        hidden = torch.empty(found.shape, dtype=found.dtype, device=found.device, requires_grad=training)
        stage = PipelineStage(
            self.stage,
            self.index,
            self.mesh["pipeline"].size(),
            torch.device(self.mesh.device_type),
            input_args=(microbatch[self.stage.names[0]] if self.stage.is_first else hidden,),
            output_args=(hidden,),
            group=self.mesh["pipeline"].get_group(),
        )
        kind = SCHEDULES[self._schedule] if training else ScheduleGPipe
        return kind(stage, self._microbatches, loss_fn=self._loss if training else None)

    def _is_summed(self, name: str) -> bool:
        return self.plan.get(name.rpartition(".")[0]) == "summed"

    def _exchange_tied_(self) -> None:
        """Add up the gradients of a tensor that two stages hold: each sends its own to the other."""
        group = self.mesh["pipeline"].get_group()
        for names in self._tied:
            mine = names.get(self.index)
            if mine is None:
                continue
            (other,) = (part for part in names if part != self.index)
            parameter = self.stage.body.get_parameter(mine)
            grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            theirs = torch.empty_like(grad)
            works = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, grad.contiguous(), group=group, group_peer=other),
                    dist.P2POp(dist.irecv, theirs, group=group, group_peer=other),
                ]
            )
            for work in works:
                work.wait()
            parameter.grad = grad + theirs


def _check(bounds: Sequence[int], mesh: DeviceMesh, plan: TensorPlan, microbatches: int, schedule: str) -> None:
    stages = mesh["pipeline"].size()
    doing = f"running {stages} stages"
    if len(bounds) - 1 != stages:
        raise ConfigError(doing, found=f"{len(bounds) - 1} parts", expected=f"{stages}, one for each stage of the mesh")
    if schedule not in SCHEDULES:
        raise ConfigError(doing, found=f"schedule {schedule!r}", expected=f"one of {', '.join(get_args(Schedule))}")
    if microbatches < (stages if schedule == "1f1b" else 1):
        raise ConfigError(
            doing,
            found=f"{microbatches} microbatches by {schedule}",
            expected=f"at least {stages if schedule == '1f1b' else 1}",
            fix="raise microbatches, or take schedule 'gpipe'",
        )
    if mesh["tensor"].size() > 1 and not plan:
        found = f"{mesh['tensor'].size()} tensor-parallel ranks, and no plan"
        raise ConfigError(doing, found=found, fix="make one with modelpress.parallel.tensor.plan_tensors")


def _tied(module: nn.Module, outlined: Outline, bounds: Sequence[int]) -> list[dict[int, str]]:
    """For each tensor that stages share: its name in each of them.

    Raises:
        StageError: more than two share one.
    """
    by_tensor: dict[int, dict[int, str]] = {}
    trained = {id(parameter) for parameter in module.parameters()}
    for part in range(len(bounds) - 1):
        for name, tensor in outlined.parameters(module, tuple(bounds), part).items():
            if id(tensor) in trained:
                by_tensor.setdefault(id(tensor), {}).setdefault(part, name)
    found = [names for names in by_tensor.values() if len(names) > 1]
    for names in found:
        if len(names) > 2:
            raise StageError(
                f"splitting {type(module).__name__} into {len(bounds) - 1} stages",
                found=f"{next(iter(names.values()))}, which stages {', '.join(map(str, names))} all hold",
                expected="a tensor that at most two stages share",
                fix="split it into two parts, or by tensors",
            )
    return found
