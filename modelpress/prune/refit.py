"""Least squares across a gap: the block before removed ones is fitted to give what they gave.

A block that ends in h = r + W·a + b (r: the residual stream, a: what its last linear layer reads) can take the removed
blocks' place as far as its a allows: with the hidden states t behind the gap of the unpruned model, W and b come from
the linear regression of t − r on a, over the calibration data, with a ridge towards their present values. A block that
normalises the sum, h = LN(r + W·a + b), is fitted before the normalisation, where t is brought to the sum's present
mean and size: the normalisation takes both away. ReplaceMe (Shopkhoev et al. 2025, arXiv:2505.02819) fits a map of the
block's outputs and merges it into the same layer; this is the wider problem, in which the residual stream stays exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelpress.distill import counted
from modelpress.errors import StageError
from modelpress.moments import Moments, input_of
from modelpress.prune.repair import BATCH_SIZE, damped
from modelpress.survey import users
from modelpress.workload import Workload

TOLERANCE = 1e-3
"""Of the largest element, for a sum that must follow its last summand; more where the dtype is coarser."""

LEAST_GAIN = 1e-6
"""Of the largest gain of a normalisation; a feature with less says nothing of what was before it."""


@dataclass(frozen=True)
class Joint:
    """Where a block adds the outputs of its last linear layer to what it hands on."""

    name: str
    block: nn.Module
    linear: nn.Linear
    norm: nn.LayerNorm | None
    """Normalises the sum; None where the sum is the block's output."""


@dataclass
class _Seen:
    """Of the latest call of a block."""

    order: list[nn.Module]
    outputs: dict[nn.Module, Tensor]
    inputs: dict[nn.Module, Tensor]


class _Done(Exception):  # noqa: N818 - no error: it ends a forward pass that has shown what it should
    """The rest of the forward pass is not needed, and might change what was seen in place."""


class _Watch:
    """Hooks on a block and its linear layers and normalisations; the forward pass inside ends with the block."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.seen = block, _Seen([], {}, {})

    def __enter__(self) -> _Seen:
        def hook(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.seen.order.append(child)
            self.seen.outputs[child] = output[0] if isinstance(output, tuple | list) else output
            if child is self.block:
                raise _Done
            self.seen.inputs[child] = input_of(args, kwargs)

        watched = [child for child in self.block.modules() if isinstance(child, nn.Linear | nn.LayerNorm)]
        self.handles = [
            child.register_forward_hook(hook, with_kwargs=True) for child in dict.fromkeys([*watched, self.block])
        ]
        return self.seen

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        for handle in self.handles:
            handle.remove()
        return kind is _Done


def find_joint(module: nn.Module, block: nn.Module, name: str, example: dict[str, Tensor]) -> Joint:
    """How a block ends, proven by a shift of its last linear layer's outputs that must arrive in the sum.

    Raises:
        StageError: it ends otherwise, or the layer's weight is used elsewhere too.
    """
    with _Watch(block) as seen:
        module(**example)
    linear = next((child for child in reversed(seen.order) if isinstance(child, nn.Linear)), None)
    if linear is None or linear is block:
        raise _unfit(name, "no linear layer in it")
    if seen.order.count(linear) > 1 or len(users(module, linear)) > 1:
        raise _unfit(name, "a last linear layer whose weight is used twice")
    output = seen.outputs[block]
    norms = [child for child, given in seen.outputs.items() if given is output and isinstance(child, nn.LayerNorm)]
    joint = Joint(name, block, linear, norms[0] if norms else None)
    total = _sum_of(joint, seen)
    shift = (float(total.abs().max()) * torch.linspace(-1, 1, linear.out_features)).to(total)
    tolerance = max(TOLERANCE, 8 * torch.finfo(total.dtype).eps) * float(shift.abs().max())
    handle = linear.register_forward_hook(lambda _module, _args, given: given + shift)
    try:
        with _Watch(block) as shifted:
            module(**example)
    finally:
        handle.remove()
    arrived = _sum_of(joint, shifted) - total
    if arrived.shape[-1] != len(shift) or not float((arrived - shift).abs().max()) <= tolerance:
        raise _unfit(name, "a last linear layer whose outputs are not simply added to what it hands on")
    return joint


def _unfit(name: str, found: str) -> StageError:
    return StageError(
        f"looking how {name} could fill the gap behind it",
        found=found,
        expected="a block that ends in a sum of its input and a linear layer's outputs, normalised or not",
        fix="set prune.repair to false",
    )


def _sum_of(joint: Joint, seen: _Seen) -> Tensor:
    return seen.outputs[joint.block] if joint.norm is None else seen.inputs[joint.norm]


def refit_(module: nn.Module, joint: Joint, dense: nn.Module, target: nn.Module, workload: Workload) -> None:
    """Fit the joint's linear layer of `module` so that its block gives what the block `target` of `dense` gives.

    Its parameters are replaced, not written to: `dense` may share them.

    Raises:
        StageError: activations that are NaN or infinite.
    """
    moments = Moments(joint.linear, joint.name, constant=True)
    features, outputs = joint.linear.in_features, joint.linear.out_features
    cross = torch.zeros(features + 1, outputs, dtype=torch.float64)
    for batch in workload.batches("calibration", BATCH_SIZE):
        mask = batch.inputs.get("attention_mask")
        with _Watch(target) as wanted:
            dense(**batch.inputs)
        with _Watch(joint.block) as seen:
            module(**batch.inputs)
        summed = _sum_of(joint, seen)
        inputs = seen.inputs[joint.linear].reshape(*summed.shape[:-1], features)  # OPT's layers flatten what they take
        total = counted(summed, mask).float()
        residual = _wanted_sum(joint, counted(wanted.outputs[target], mask).float(), total) - total
        moments.add(inputs, mask)
        rows = counted(inputs, mask).float()
        cross += (torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1).T @ residual).double()
    if not torch.isfinite(cross).all():
        raise StageError(
            f"re-fitting {joint.name}", found="hidden states that are NaN or infinite", expected="finite ones"
        )
    h, cross = damped(moments), cross / moments.rows
    if joint.linear.bias is None:  # nothing can take up the mean
        h, cross = h[:-1, :-1], cross[:-1]
    change = torch.linalg.solve(h, cross).T.to(joint.linear.weight.dtype)
    _add(joint.linear, "weight", change[:, :features])
    if joint.linear.bias is not None:
        _add(joint.linear, "bias", change[:, features])


def _wanted_sum(joint: Joint, target: Tensor, present: Tensor) -> Tensor:
    """What the sum should be, (rows, dim): the target, or what becomes it by the normalisation, near `present`."""
    norm = joint.norm
    if norm is None:
        return target
    gain = torch.ones_like(target[0]) if norm.weight is None else norm.weight
    shift = torch.zeros_like(gain) if norm.bias is None else norm.bias
    mean, size = present.mean(dim=1, keepdim=True), present.std(dim=1, keepdim=True)
    says = gain.abs() > LEAST_GAIN * gain.abs().max()
    before = torch.where(says, (target - shift) / torch.where(says, gain, 1.0), (present - mean) / size)
    before = before - before.mean(dim=1, keepdim=True)
    return before / before.std(dim=1, keepdim=True) * size + mean


def _add(layer: nn.Linear, key: str, change: Tensor) -> None:
    old: nn.Parameter = getattr(layer, key)
    setattr(layer, key, nn.Parameter(old.detach() + change, requires_grad=old.requires_grad))
