"""A rank of a data × pipeline × tensor mesh: its part of the model, and what runs it with the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleLoopedBFS,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

from modelpress.errors import ConfigError, StageError
from modelpress.parallel.mesh import answered, average_gradients_, sum_gradients_, wait_for
from modelpress.parallel.outline import Outline
from modelpress.parallel.pipeline import Stage
from modelpress.parallel.tensor import TensorPlan, parallelize_

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Schedule = Literal["gpipe", "1f1b", "interleaved"]
"""GPipe (arXiv:1811.06965) runs all microbatches forward, then all backward; 1F1B (PipeDream-Flush, Narayanan et al.
2020, arXiv:2006.09503) takes turns, and keeps the activations of at most as many microbatches as there are stages.
Interleaved (Narayanan et al. 2021, arXiv:2104.04473, section 2.2) takes turns too, and gives each rank several smaller
parts of the model, apart by as many as there are ranks: ranks wait less, and send more often."""

Scheduled = PipelineScheduleSingle | PipelineScheduleMulti

Loss = Callable[[Tensor, Tensor], Tensor]
"""The mean over the samples of a microbatch's outputs and targets."""


class Runner:
    """What one rank holds and does; each rank makes one of the same arguments and calls the same methods.

    Args:
        module: the whole model, equal on all ranks; it may have meta tensors for `load_` to replace. It is not changed.
        outlined: its outline.
        bounds: of the pipeline's parts: as many as the mesh has stages; with `interleaved` twice, three times, … as
            many, of which a rank has every n-th.
        mesh: see `mesh.make_mesh`.
        names: the model's inputs; each has the samples on its first axis.
        plan: which layers are cut among the tensor-parallel ranks; needed where the mesh has several.
        microbatches: into how many parts each rank's batch is cut.
        loss: for training.
        schedule: see `Schedule`.

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
        _check(bounds, mesh, self.plan, microbatches, schedule, trains=loss is not None)
        parts, ranks = len(bounds) - 1, mesh["pipeline"].size()
        self.stages = {part: Stage(module, outlined, bounds, part, names) for part in range(self.index, parts, ranks)}
        """This rank's parts of the model, by their number, in order; one but with `interleaved`."""
        self._parts, self._all = parts, nn.ModuleList(self.stages.values())
        self._loss, self._microbatches, self._schedule = loss, microbatches, schedule
        self._made: dict[bool, tuple[object, Scheduled]] = {}
        self._tied = _tied(module, outlined, bounds, ranks)
        if mesh["tensor"].size() > 1:
            with answered("cutting layers among tensor-parallel ranks"):
                for stage in self.stages.values():
                    is_meta = any(parameter.is_meta for parameter in stage.parameters())
                    parallelize_(stage.body, mesh["tensor"], self.plan, from_local=is_meta)

    @property
    def stage(self) -> Stage:
        """This rank's only part of the model.

        Raises:
            ConfigError: it has several; see `stages`.
        """
        if len(self.stages) > 1:
            found = f"parts {', '.join(map(str, self.stages))} of {self._parts}"
            raise ConfigError("taking a rank's stage", found=found, expected="one", fix="go through Runner.stages")
        return self.stages[self.index]

    @property
    def is_last(self) -> bool:
        """Whether the model's answers come out here."""
        return self._parts - 1 in self.stages

    def train_step(self, inputs: Mapping[str, Tensor], targets: Tensor) -> Tensor | None:
        """Forward and backward of this rank's slice of the batch: gradients are added to those of the parameters of
        its stages, the mean over all copies' samples where the loss is a mean and all slices are equal.

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
            named = [one for stage in self.stages.values() for one in stage.body.named_parameters()]
            sum_gradients_([one for name, one in named if self._is_summed(name)], self.mesh["tensor"].get_group())
            average_gradients_(self._all, self.mesh["data"].get_group())
        return torch.stack([loss.detach() for loss in losses]).mean() if self.is_last else None

    def infer(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """The model's outputs for this rank's slice of the batch on the last stage; None on all others.

        Raises:
            ConfigError: samples that the microbatches do not divide.
            StageError: another rank is gone.
        """
        with answered("running the model"), torch.no_grad():
            found = self._run(inputs, None, None)
        return found if self.is_last else None

    def _run(self, inputs: Mapping[str, Tensor], targets: Tensor | None, losses: list[Tensor] | None) -> Tensor | None:
        samples = {len(tensor) for tensor in inputs.values()}
        if len(samples) != 1 or samples.pop() % self._microbatches:
            raise ConfigError(
                f"cutting a batch into {self._microbatches} microbatches",
                found=", ".join(f"{name}: {len(tensor)} samples" for name, tensor in inputs.items()),
                expected=f"a multiple of {self._microbatches}, the same of each input",
            )
        schedule = self._scheduled(inputs, losses is not None)
        named: dict[str, Any] = dict(inputs)  # for all stages; the first part is given one by position
        args = (inputs[self.stages[0].names[0]],) if 0 in self.stages else ()
        if losses is None:
            found: Tensor | None = schedule.eval(*args, **named)
        else:
            found = schedule.step(*args, target=targets, losses=losses, return_outputs=False, **named)
        return found

    def _scheduled(self, inputs: Mapping[str, Tensor], training: bool) -> Scheduled:
        """The schedule for inputs of these shapes: a pipeline's buffers are made once for them."""
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in sorted(inputs.items()))
        made = self._made.get(training)
        if made is None or made[0] != shapes:
            made = shapes, self._schedule_for(inputs, training)
            self._made[training] = made
        return made[1]

    def _schedule_for(self, inputs: Mapping[str, Tensor], training: bool) -> Scheduled:
        # Shapes are told and not left to be found: else ranks send each other pickled ones, after a pass for nothing.
        microbatch = {name: tensor[: len(tensor) // self._microbatches] for name, tensor in inputs.items()}
        found = self.stages[self.index].hidden(microbatch)
        hidden = torch.empty(found.shape, dtype=found.dtype, device=found.device, requires_grad=training)
        stages: list[Any] = [
            PipelineStage(
                stage,
                part,
                self._parts,
                torch.device(self.mesh.device_type),
                input_args=(microbatch[stage.names[0]] if stage.is_first else hidden,),
                output_args=(hidden,),
                group=self.mesh["pipeline"].get_group(),
            )
            for part, stage in self.stages.items()
        ]
        if not training:  # PyTorch divides gradients by the microbatches then too: those that wait for an update
            if len(stages) > 1:
                return ScheduleLoopedBFS(stages, self._microbatches, scale_grads=False)
            return ScheduleGPipe(stages[0], self._microbatches, scale_grads=False)
        if len(stages) > 1:
            return ScheduleInterleaved1F1B(stages, self._microbatches, loss_fn=self._loss)
        single = Schedule1F1B if self._schedule == "1f1b" else ScheduleGPipe
        return single(stages[0], self._microbatches, loss_fn=self._loss)

    def _is_summed(self, name: str) -> bool:
        return self.plan.get(name.rpartition(".")[0]) == "summed"

    def _exchange_tied_(self) -> None:
        """Add up the gradients of a tensor that two stages hold: each sends its own to the other."""
        group = self.mesh["pipeline"].get_group()
        ranks = self.mesh["pipeline"].size()
        for names in self._tied:
            part = next((part for part in names if part in self.stages), None)
            if part is None:
                continue
            (other,) = (other % ranks for other in names if other != part)
            parameter = self.stages[part].body.get_parameter(names[part])
            grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            theirs = torch.empty_like(grad)
            works = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, grad.contiguous(), group=group, group_peer=other),
                    dist.P2POp(dist.irecv, theirs, group=group, group_peer=other),
                ]
            )
            wait_for(works)
            parameter.grad = grad + theirs


def _check(
    bounds: Sequence[int], mesh: DeviceMesh, plan: TensorPlan, microbatches: int, schedule: str, *, trains: bool
) -> None:
    stages, parts = mesh["pipeline"].size(), len(bounds) - 1
    doing = f"running {stages} stages"
    if schedule not in get_args(Schedule):
        raise ConfigError(doing, found=f"schedule {schedule!r}", expected=f"one of {', '.join(get_args(Schedule))}")
    if schedule == "interleaved":
        if stages == 1 or parts % stages or parts == stages:
            raise ConfigError(
                doing,
                found=f"{parts} parts of the model, interleaved",
                expected=f"{2 * stages}, {3 * stages}, …: several for each of at least two ranks",
            )
    elif parts != stages:
        raise ConfigError(doing, found=f"{parts} parts", expected=f"{stages}, one for each stage of the mesh")
    least = stages if trains and schedule != "gpipe" else 1
    if microbatches < least or (trains and schedule == "interleaved" and microbatches % stages):
        raise ConfigError(
            doing,
            found=f"{microbatches} microbatches by {schedule}",
            expected=f"a multiple of {stages}" if schedule == "interleaved" else f"at least {least}",
            fix="raise microbatches, or take schedule 'gpipe'",
        )
    if mesh["tensor"].size() > 1 and not plan:
        found = f"{mesh['tensor'].size()} tensor-parallel ranks, and no plan"
        raise ConfigError(doing, found=found, fix="make one with modelpress.parallel.tensor.plan_tensors")


def _tied(module: nn.Module, outlined: Outline, bounds: Sequence[int], ranks: int) -> list[dict[int, str]]:
    """For each tensor that parts share: its name in each of them.

    Raises:
        StageError: more than two share one, or two of the same rank.
    """
    by_tensor: dict[int, dict[int, str]] = {}
    trained = {id(parameter) for parameter in module.parameters()}
    for part in range(len(bounds) - 1):
        for name, tensor in outlined.parameters(module, tuple(bounds), part).items():
            if id(tensor) in trained:
                by_tensor.setdefault(id(tensor), {}).setdefault(part, name)
    found = [names for names in by_tensor.values() if len(names) > 1]
    for names in found:
        if len(names) > 2 or len({part % ranks for part in names}) < 2:
            raise StageError(
                f"splitting {type(module).__name__} into {len(bounds) - 1} stages",
                found=f"{next(iter(names.values()))}, which stages {', '.join(map(str, names))} all hold",
                expected="a tensor that at most two stages share, of different ranks",
                fix="split it into two parts, or by tensors",
            )
    return found
