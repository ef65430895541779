"""What the blocks of a model cost: bytes and FLOPs, counted, or seconds, measured here."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from modelpress.distill import frozen
from modelpress.errors import ConfigError
from modelpress.parallel.outline import Outline, outline
from modelpress.parallel.partition import Partition, balanced, equal_counts
from modelpress.progress import Progress, silent
from modelpress.reports import PartitionReport, PartReport
from modelpress.survey import hooked

By = Literal["bytes", "flops", "seconds"]
REPEATS = 7
"""Timed calls; the median counts, and a first one is not counted."""


def costs_of(module: nn.Module, outlined: Outline, inputs: Mapping[str, Tensor], by: By) -> list[float]:
    """What each block costs; what runs before the blocks is added to the first, what runs after them to the last, as
    they stay with these.

    Args:
        module: in the mode in which it is to be judged.
        outlined: its outline.
        inputs: an example of a microbatch, for `flops` and `seconds`.
        by: `bytes` of parameters and buffers, a tensor that two ends share counted for both; `flops` of a forward pass
            (multiply and add are two), of matrix products, convolutions and attention; `seconds` of a forward pass on
            this machine.

    Raises:
        ConfigError: an unknown `by`.
    """
    if by == "bytes":
        return _bytes(module, outlined)
    if by == "flops":
        with FlopCounterMode(display=False) as counter:
            return _between(module, outlined, inputs, lambda: float(counter.get_total_flops()))
    if by == "seconds":
        _between(module, outlined, inputs, time.perf_counter)
        runs = [_between(module, outlined, inputs, time.perf_counter) for _ in range(REPEATS)]
        return [statistics.median(run[block] for run in runs) for block in range(len(outlined.blocks))]
    raise ConfigError("splitting a model", found=f"by {by!r}", expected=f"one of {', '.join(get_args(By))}")


def split(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    parts: int,
    by: By = "bytes",
    *,
    outlined: Outline | None = None,
    progress: Progress = silent,
) -> tuple[Partition, PartitionReport]:
    """Split a model into contiguous parts of its blocks, the dearest as cheap as it can be.

    Args:
        module: takes the inputs as keyword arguments.
        inputs: an example of a microbatch: at least two samples.
        parts: how many; at most as many as there are blocks.
        by: what is balanced; see `costs_of`. The others are in the report.
        outlined: the model's outline, where it is known.
        progress: called once per cost.

    Raises:
        StageError: the model is no chain of blocks.
        ConfigError: more parts than blocks.
    """
    outlined = outlined or outline(module, inputs)
    kinds: tuple[By, ...] = get_args(By)
    costs: dict[By, list[float]] = {}
    for number, kind in enumerate(kinds):
        progress(number, len(kinds), kind)
        costs[kind] = costs_of(module, outlined, inputs, kind)
    progress(len(kinds), len(kinds))
    chosen, naive = balanced(costs[by], parts), equal_counts(costs[by], parts)
    sums = {kind: Partition(tuple(found), chosen.bounds).sums for kind, found in costs.items()}
    rows = [
        PartReport(
            first_block=outlined.blocks[chosen.bounds[part]],
            last_block=outlined.blocks[chosen.bounds[part + 1] - 1],
            blocks=len(chosen.blocks(part)),
            size_bytes=round(sums["bytes"][part]),
            flops=round(sums["flops"][part]),
            forward_seconds=sums["seconds"][part],
        )
        for part in range(parts)
    ]
    report = PartitionReport(
        by=by,
        parts=rows,
        bounds=list(chosen.bounds),
        imbalance=chosen.imbalance,
        equal_counts_imbalance=naive.imbalance,
        block_bytes=[round(cost) for cost in costs["bytes"]],
        block_flops=[round(cost) for cost in costs["flops"]],
        block_seconds=costs["seconds"],
    )
    return chosen, report


def _bytes(module: nn.Module, outlined: Outline) -> list[float]:
    """Bytes of each block's tensors, and of those that stay with the first or the last."""
    groups = [[name] for name in outlined.blocks]
    groups[0] += outlined.before
    groups[-1] += outlined.after
    found = []
    for group in groups:
        children = [module.get_submodule(name) for name in group]
        tensors = {id(tensor): tensor for child in children for tensor in child.state_dict(keep_vars=True).values()}
        found.append(float(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())))
    return found


def _between(
    module: nn.Module, outlined: Outline, inputs: Mapping[str, Tensor], clock: Callable[[], float]
) -> list[float]:
    """What a clock counts from one block's begin to the next one's; the ends with the first and the last block."""
    marks: list[float] = []

    def enter(*_: Any) -> None:
        marks.append(clock())

    blocks = [module.get_submodule(name) for name in outlined.blocks[1:]]
    with torch.no_grad(), frozen(module), hooked([block.register_forward_pre_hook(enter) for block in blocks]):
        started = clock()
        module(**inputs)
        marks = [started, *marks, clock()]
    return [after - before for before, after in itertools.pairwise(marks)]
