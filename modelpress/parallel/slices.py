"""Tensors that are stored as tensor-parallel ranks take them: each rank's share a tensor of its own.

A share of rank r of n has the name ``rank<r>of<n>.`` and the tensor's, so that `shard.by: layer` gives each layer's
shares of each rank a shard of their own, and `rank` all shares of each rank shards of their own; the checkpoint's
metadata say along which axis each tensor was cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from modelpress.checkpoint import Checkpoint
from modelpress.errors import ConfigError, CorruptionError

KEY = "slices"
"""Of the checkpoint's metadata: ``{"ranks": n, "axes": {name: axis}}``."""

Axis = Callable[[str], int | None]
"""Along which axis a tensor is cut, by its name; None: not at all."""


@dataclass(frozen=True)
class Share:
    """One of `ranks` equal shares of a tensor along an axis."""

    axis: int
    rank: int
    ranks: int


def share_name(name: str, rank: int, ranks: int) -> str:
    """Under which name a rank's share of a tensor is stored."""
    return f"rank{rank}of{ranks}.{name}"


def rank_of(name: str) -> int | None:
    """Whose share is stored under a name; None: a tensor that each rank takes whole."""
    match = re.match(r"rank([0-9]{1,9})of[0-9]{1,9}\.", name)
    return int(match[1]) if match else None


def sliced(checkpoint: Checkpoint, axis_of: Axis, ranks: int) -> Checkpoint:
    """The checkpoint with its cut tensors as shares; the others as they are. Values are not changed.

    Args:
        checkpoint: of a torch model.
        axis_of: see `Axis`; `parallel.tensor.axis_of` with a plan is one.
        ranks: shares of each cut tensor.

    Raises:
        ConfigError: no torch checkpoint, one that is cut already, nothing to cut, or a size that the ranks do not
            divide; the tensor is named.
    """
    doing = f"cutting a checkpoint for {ranks} tensor-parallel ranks"
    if checkpoint.kind != "torch" or KEY in checkpoint.metadata or ranks < 1:
        found = "one that is cut already" if KEY in checkpoint.metadata else f"kind {checkpoint.kind}, {ranks} ranks"
        raise ConfigError(doing, found=found, expected="a torch checkpoint of whole tensors, and at least one rank")
    tensors: dict[str, Tensor] = {}
    axes: dict[str, int] = {}
    for name, tensor in checkpoint.tensors.items():
        axis = axis_of(name)
        if axis is None:
            tensors[name] = tensor
            continue
        if not 0 <= axis < tensor.ndim or tensor.shape[axis] % ranks:
            raise ConfigError(f"{doing}, {name}", found=f"{list(tensor.shape)}", expected=f"axis {axis} in {ranks}")
        axes[name] = axis
        for rank, part in enumerate(tensor.chunk(ranks, axis)):
            tensors[share_name(name, rank, ranks)] = part.contiguous()
    if not axes:
        raise ConfigError(doing, found="no tensor that is cut", fix="give axis_of of a plan of this model's names")
    return replace(checkpoint, tensors=tensors, metadata=checkpoint.metadata | {KEY: {"ranks": ranks, "axes": axes}})


def joined(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Tensor]:
    """Undo `sliced`: every tensor whole, under its own name.

    Raises:
        CorruptionError: a share is missing, or the metadata are not what `sliced` writes.
    """
    ranks, axes = cut_of(metadata)
    found = dict(tensors)
    for name, axis in axes.items():
        shares = [share_name(name, rank, ranks) for rank in range(ranks)]
        missing = [share for share in shares if share not in found]
        if missing:
            raise CorruptionError(f"joining the shares of {name}", found=f"no {missing[0]}", expected=f"{ranks} shares")
        found[name] = torch.cat([found.pop(share) for share in shares], axis)
    return found


def whole(checkpoint: Checkpoint) -> Checkpoint:
    """Undo `sliced`; a checkpoint of whole tensors as it is.

    Raises:
        CorruptionError: see `joined`.
    """
    if KEY not in checkpoint.metadata:
        return checkpoint
    metadata = {key: value for key, value in checkpoint.metadata.items() if key != KEY}
    return replace(checkpoint, tensors=joined(checkpoint.tensors, checkpoint.metadata), metadata=metadata)


def cut_of(metadata: Mapping[str, Any]) -> tuple[int, dict[str, int]]:
    """Into how many shares the tensors of a checkpoint are cut, and along which axes; (1, {}) where none is.

    Raises:
        CorruptionError: the metadata are not what `sliced` writes.
    """
    stated = metadata.get(KEY)
    if stated is None:
        return 1, {}
    ranks = stated.get("ranks") if isinstance(stated, dict) else None
    axes = stated.get("axes") if isinstance(stated, dict) else None
    if isinstance(ranks, int) and isinstance(axes, dict) and type(ranks) is int and 1 <= ranks <= 2**16:  # no bool
        legal: dict[str, int] = {str(name): axis for name, axis in axes.items() if type(axis) is int and 0 <= axis < 64}
        if len(legal) == len(axes):
            return ranks, legal
    raise CorruptionError(
        f"reading a checkpoint's metadata.{KEY}", found=repr(stated)[:200], expected="ranks, and axes by name"
    )


def sources(share: Share | None, stored_ranks: int) -> list[int]:
    """The ranks whose stored shares a share of a tensor (None: all of it) is made from; it need not be cut into as many
    as are stored."""
    if share is None:
        return list(range(stored_ranks))
    first = share.rank * stored_ranks // share.ranks
    last = -(-(share.rank + 1) * stored_ranks // share.ranks)
    return list(range(first, last))


def assembled(parts: list[Tensor], share: Share | None, stored_axis: int | None, stored_ranks: int) -> Tensor:
    """A share of a tensor (None: all of it) from what is stored; in memory of its own where it is less than that.

    Args:
        parts: the stored shares that `sources` names, in their order; all of them where `share` has another axis.
        share: what is wanted.
        stored_axis: along which the tensor is stored in shares; None: it is stored whole, as the one of `parts`.
        stored_ranks: shares that are stored of a tensor that is stored so.

    Raises:
        ConfigError: the axis is no multiple of the wanted shares.
    """
    held = torch.cat(parts, stored_axis) if stored_axis is not None and len(parts) > 1 else parts[0]
    if share is None:
        return held
    first = 0  # where what is held begins
    size = held.shape[share.axis] if share.axis < held.ndim else 0
    if share.axis == stored_axis:
        each = parts[0].shape[share.axis]
        first, size = share.rank * stored_ranks // share.ranks * each, each * stored_ranks
    if not size or size % share.ranks:
        raise ConfigError(
            f"taking share {share.rank} of {share.ranks} of a tensor along axis {share.axis}",
            found=f"{size} elements there",
            expected=f"a multiple of {share.ranks}",
        )
    count = size // share.ranks
    if held.shape[share.axis] == count:
        return held
    return held.narrow(share.axis, share.rank * count - first, count).clone(memory_format=torch.contiguous_format)
