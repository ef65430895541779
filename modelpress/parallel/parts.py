"""Tensors of which each rank holds a part (`torch.distributed.tensor.DTensor`), and whole ones.

PyTorch's module for them takes long to import, and most trainings have none.
"""

from __future__ import annotations

from torch import Tensor


def whole(value: Tensor) -> Tensor:
    """A tensor of which each rank holds a part, as one; every rank has to ask. A plain one as it is."""
    if not hasattr(value, "full_tensor"):
        return value
    found: Tensor = value.full_tensor()
    return found


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, where `like` is spread; the tensor itself where it is not."""
    if not hasattr(like, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
