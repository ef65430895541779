"""Ranks in a grid: copies of the model by stages of it by shares of its layers."""

from __future__ import annotations

import contextlib
import dis
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from modelpress.errors import ConfigError, StageError

DIMENSIONS = ("data", "pipeline", "tensor")
"""The innermost last: ranks that share layers talk most, and are neighbours, on one host where there are several."""
WAITING = (
    "torch.distributed.distributed_c10d",
    "torch.distributed._functional_collectives",
    "torch.distributed.pipelining.schedules",
)
"""Modules of PyTorch from whose code ranks wait for each other; of ours it is `wait_for`."""


@dataclass(frozen=True)
class MeshSizes:
    """Ranks along each dimension; their product is the number of all ranks."""

    data: int = 1
    """Copies of the model, each on its own slice of every batch."""
    pipeline: int = 1
    """Stages of a copy."""
    tensor: int = 1
    """Ranks that share the layers of a stage."""

    @property
    def ranks(self) -> int:
        """How many there are in all."""
        return self.data * self.pipeline * self.tensor


def make_mesh(sizes: MeshSizes, device: str = "cpu") -> DeviceMesh:
    """The mesh of all ranks, with the dimensions `data`, `pipeline` and `tensor`; every rank must call it.

    Args:
        sizes: of the dimensions.
        device: `cpu` (gloo) or `cuda` (NCCL; never run).

    Raises:
        ConfigError: the sizes are not those of the process group, or one is below 1.
        StageError: there is no process group.
    """
    shape = (sizes.data, sizes.pipeline, sizes.tensor)
    doing = f"making a mesh of data × pipeline × tensor = {' × '.join(map(str, shape))}"
    if not dist.is_initialized():
        raise StageError(doing, found="no process group", fix="start the ranks with torchrun, or init_process_group")
    if min(shape) < 1 or sizes.ranks != dist.get_world_size():
        raise ConfigError(
            doing,
            found=f"{dist.get_world_size()} ranks",
            expected=f"{sizes.ranks} ranks, and at least one along each dimension",
        )
    return init_device_mesh(device, shape, mesh_dim_names=DIMENSIONS)


@contextlib.contextmanager
def answered(doing: str) -> Iterator[None]:
    """Say in plain words when another rank died or did not answer in time, and not in those of the transport.

    Raises:
        StageError: the block failed because of that.
    """
    try:
        yield
    except RuntimeError as error:
        *_, cause = _causes(error)  # the pipeline wraps what its stages raise
        if not isinstance(cause, dist.DistError) and not _arose_waiting(cause):
            raise
        first = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        rank = f"rank {dist.get_rank()} of {dist.get_world_size()}" if dist.is_initialized() else "a rank"
        raise StageError(
            f"{doing}, on {rank}",
            found=f"another rank died, or did not answer in time: {first[:300]}",
            expected="all ranks at the same point",
            fix="look at the log of the rank that ended first; what is left is started again as a whole",
        ) from error


def wait_for(works: Sequence[dist.Work]) -> None:
    """Wait until these have been sent or received; within `answered`."""
    for work in works:
        work.wait()


def average_gradients_(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Replace each gradient by its mean over the ranks of a group that hold the same parameters: one all-reduce for
    each dtype."""
    _reduce_([parameter.grad for parameter in module.parameters() if parameter.grad is not None], group, mean=True)


def sum_gradients_(parameters: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Replace the gradients of these by their sum over the ranks of a group."""
    _reduce_([parameter.grad for parameter in parameters if parameter.grad is not None], group, mean=False)


def _reduce_(gradients: list[Tensor], group: dist.ProcessGroup, *, mean: bool) -> None:
    if group.size() == 1:
        return
    with torch.no_grad():
        local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in gradients]
        for dtype in sorted({grad.dtype for grad in local}, key=str):
            members = [grad for grad in local if grad.dtype == dtype]
            flat = torch.cat([grad.reshape(-1) for grad in members])
            dist.all_reduce(flat, group=group)
            if mean:
                flat /= group.size()
            for grad, part in zip(members, torch.split(flat, [grad.numel() for grad in members]), strict=True):
                grad.copy_(part.view_as(grad))


def _arose_waiting(error: BaseException) -> bool:
    """Whether the transport raised it: native code, which was called where ranks wait for each other.

    Gloo's errors are plain RuntimeErrors, as those of a layer are; what they say is not for programs.
    """
    steps = list(_steps(error))
    while steps and _module(steps[-1][0]) == "torch._ops":  # the way to an operator, whoever calls it
        steps.pop()
    if not steps:
        return False
    frame, at = steps[-1]
    if frame.f_code is not wait_for.__code__ and _module(frame) not in WAITING:
        return False
    return dis.opname[frame.f_code.co_code[at]] != "RAISE_VARARGS"  # Python code refused what it was given


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))


def _steps(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """The frames that an error went through, the innermost last, and the instruction at which each was."""
    step = error.__traceback__
    while step is not None:
        yield step.tb_frame, step.tb_lasti
        step = step.tb_next


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__
