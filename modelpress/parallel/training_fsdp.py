"""What FSDP2 lacks for a training in the midst of other work: bytes counted, and the module as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from modelpress.blocks import layer_list
from modelpress.errors import WorkloadError
from modelpress.parallel.parts import whole
from modelpress.parallel.ranks import Ranks

# Their names since PyTorch 2.13, and before.
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class _Gathering(AllGather):
    """PyTorch's own, counted."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        self.ranks.traffic.gathered("parameters", output_tensor.nbytes)
        work: dist.Work | None = _gather(output_tensor, input_tensor, group=group, async_op=async_op)
        return work


class _Scattering(ReduceScatter):
    """PyTorch's own, counted."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        self.ranks.traffic.scattered("parameters", input_tensor.nbytes)
        work: dist.Work | None = _scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        return work


def sharded(module: nn.Module, ranks: Ranks) -> nn.Module:
    """The module itself, of whose weights each rank now holds a part: block by block, and the rest.

    The memory of the whole ones is given back: the old parameters are empty until `restored` fills them.
    """
    whole_ones = list(module.parameters())
    mesh = DeviceMesh.from_group(ranks.weights, ranks.device.type)
    try:
        blocks = list(layer_list(module))
    except WorkloadError:  # a model without blocks is one part
        blocks = []
    for part in [*blocks, module]:
        _add_and_count(fully_shard(part, mesh=mesh), ranks)
    for parameter in whole_ones:
        parameter.data = parameter.data.new_empty(0)
    return module


def _add_and_count(module: FSDPModule, ranks: Ranks) -> None:
    """Count what a part sends, and let it add gradients up instead of averaging them."""
    module.set_custom_all_gather(_Gathering(ranks))
    module.set_custom_reduce_scatter(_Scattering(ranks))
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Behind this, `module` has the classes, hooks and parameter objects that it had before, with the new values.

    FSDP has no way back: it changes classes, adds hooks and puts its own parameters in the place of the old ones, on
    which others (masks that hold zeros, a report) may still look. Each rank has the whole model again behind it.
    """
    modules = list(module.modules())
    classes = [type(child) for child in modules]
    attributes = [dict(child.__dict__) for child in modules]
    tables = [
        {name: dict(value) for name, value in child.__dict__.items() if isinstance(value, dict)} for child in modules
    ]
    try:
        yield
        parts = [{name: value for name, value in child._parameters.items() if value is not None} for child in modules]
        found = [{name: whole(value) for name, value in one.items()} for one in parts]
    finally:
        for child, kind, known, held in zip(modules, classes, attributes, tables, strict=True):
            child.__class__ = kind
            child.__dict__.clear()
            child.__dict__.update(known)
            for name, content in held.items():  # the same tables: handles that remove hooks know them by identity
                child.__dict__[name].clear()
                child.__dict__[name].update(content)
    with torch.no_grad():
        for child, values in zip(modules, found, strict=True):
            for name, value in values.items():
                parameter = child._parameters[name]
                assert parameter is not None
                parameter.data, parameter.grad = value.detach().clone(), None
