"""Depth pruning: whole blocks leave, and the block before each gap is re-fitted to fill it.

The blocks are the elements of the model's largest ModuleList. What a block is worth is measured on calibration data:
how far it turns what it takes, 1 − cosine (the block influence of ShortGPT, Men et al. 2024, arXiv:2403.03853; Gromov
et al. 2024, arXiv:2403.17887, take the angle), or what the loss would lose without the change that it makes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelpress.blocks import drop_layers_, sketch, unlike
from modelpress.checkpoint import fit_module
from modelpress.config import PruneConfig
from modelpress.distill import counted
from modelpress.errors import CoverageError, StageError
from modelpress.progress import Progress
from modelpress.prune.importance import losses
from modelpress.prune.outcome import Outcome
from modelpress.prune.proof import unequal
from modelpress.prune.refit import find_joint, refit_
from modelpress.prune.repair import BATCH_SIZE
from modelpress.prune.select import select
from modelpress.reports import TensorChange
from modelpress.survey import chain_of
from modelpress.workload import Workload

EXAMPLE_BATCH = 3
"""Samples on which the cut model is compared with the masked one."""


@dataclass(frozen=True)
class _Stack:
    """The blocks of a model, in the order of their calls."""

    names: list[str]
    blocks: list[nn.Module]
    slot: int | str
    """Argument by which a block takes what the one before it gave."""


def prune_layers_(module: nn.Module, workload: Workload, config: PruneConfig, progress: Progress) -> Outcome:
    """Remove round(sparsity · n) of the n chosen blocks, in place; the module is left in eval mode.

    With `repair` the last linear layer of the block before each gap is re-fitted (see `modelpress.prune.refit`); what
    stands before the first block is not. Before anything changes it is proven that the model without the blocks equals
    the one that skips them, and that it can be rebuilt from its checkpoint.

    Raises:
        ConfigError, CoverageError, StageError: see `prune_`.
    """
    module.eval()
    stack = _find(module, workload)
    chosen = select(stack.names, config.targets, config.ignore)
    count = round(config.sparsity * len(chosen))
    if count >= len(stack.blocks):
        raise CoverageError(
            f"pruning the {len(stack.blocks)} blocks of {type(module).__name__}",
            found=f"all of them would go at sparsity {config.sparsity:g}",
            expected="at least one left",
            fix="lower prune.sparsity or name blocks in prune.ignore",
        )
    worth = INFLUENCES[config.importance](module, stack, workload, progress)
    order = sorted(map(stack.names.index, chosen), key=lambda number: (worth[number], number))
    gone = sorted(order[:count])
    kept = [number for number in range(len(stack.blocks)) if number not in gone]
    before = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    filled = {number: last for number, last in last_filled(kept, len(stack.blocks)).items() if last > number}
    refitted = sorted(filled) if config.repair else []
    with torch.no_grad():
        example = workload.example(EXAMPLE_BATCH)
        joints = [find_joint(module, stack.blocks[number], stack.names[number], example) for number in refitted]
        _prove(module, stack, gone, example)
        dense = sketch(module)
        drop_layers_(module, gone)
        for joint, number in zip(joints, refitted, strict=True):
            progress(refitted.index(number), len(refitted), f"re-fitting {joint.name}")
            refit_(module, joint, dense, dense.get_submodule(stack.names[filled[number]]), workload)
    return _outcome(stack, before, gone, kept, worth, refitted)


def last_filled(kept: list[int], blocks: int) -> dict[int, int]:
    """By kept block the last one whose work it has to do: what comes before the next kept block, or the end."""
    return dict(zip(kept, [number - 1 for number in [*kept[1:], blocks]], strict=True))


def _find(module: nn.Module, workload: Workload) -> _Stack:
    blocks, slot = chain_of(module, next(workload.batches("calibration", BATCH_SIZE)))
    names = {child: name for name, child in module.named_modules()}
    return _Stack([names[block] for block in blocks], blocks, slot)


@contextlib.contextmanager
def _watched(stack: _Stack, numbers: Collection[int], look: Callable[[int, Tensor, Any], Any]) -> Iterator[None]:
    """Call `look` with a block's number, what it takes (a copy: it may change it in place) and what it gives, after
    each call of one of these blocks; what `look` returns, if anything, is given instead."""
    taken: dict[int, Tensor] = {}

    def before(number: int) -> Any:
        def hook(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[stack.slot] if isinstance(stack.slot, int) else kwargs[stack.slot]
            taken[number] = torch.as_tensor(given).detach().clone()

        return hook

    def after(number: int) -> Any:
        def hook(_block: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
            states = taken.pop(number)
            if states.shape != _hidden(output).shape:
                raise StageError(
                    f"watching {stack.names[number]}",
                    found=f"outputs of shape {list(_hidden(output).shape)} of inputs of shape {list(states.shape)}",
                    expected="blocks that give what they take: only such can leave",
                    fix="remove other structures than layers",
                )
            return look(number, states, output)

        return hook

    handles = []
    for number in numbers:
        handles.append(stack.blocks[number].register_forward_pre_hook(before(number), with_kwargs=True))
        handles.append(stack.blocks[number].register_forward_hook(after(number)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hidden(output: Any) -> Tensor:
    return torch.as_tensor(output[0] if isinstance(output, tuple | list) else output)


def _turns(module: nn.Module, stack: _Stack, workload: Workload, progress: Progress) -> list[float]:
    """1 − cosine of what each block takes and what it gives, the mean over the positions that are not padding."""
    sums, rows = [0.0] * len(stack.blocks), [0] * len(stack.blocks)
    mask: list[Tensor | None] = [None]

    def look(number: int, taken: Tensor, output: Any) -> None:
        turned = 1 - nn.functional.cosine_similarity(counted(taken, mask[0]), counted(_hidden(output), mask[0]), dim=-1)
        sums[number] += float(turned.sum())
        rows[number] += len(turned)

    batches = list(workload.batches("calibration", BATCH_SIZE))
    with torch.no_grad(), _watched(stack, range(len(stack.blocks)), look):
        for index, batch in enumerate(batches):
            mask[0] = batch.inputs.get("attention_mask")
            module(**batch.inputs)
            progress(index + 1, len(batches), "influence of the blocks")
    return _finite(stack, [total / count for total, count in zip(sums, rows, strict=True)])


def _losses(module: nn.Module, stack: _Stack, workload: Workload, progress: Progress) -> list[float]:
    """First-order change of the loss when a block's output shrinks to its input, squared, the sum over batches."""
    sums = [0.0] * len(stack.blocks)
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def look(number: int, taken: Tensor, output: Any) -> None:
        seen[number] = _hidden(output), _hidden(output).detach() - taken

    with _watched(stack, range(len(stack.blocks)), look):
        for loss in losses(module, workload, progress):
            slopes = torch.autograd.grad(loss, [gave for gave, _ in seen.values()])
            for number, slope in zip(seen, slopes, strict=True):
                sums[number] += float((slope * seen[number][1]).sum(dtype=torch.float64)) ** 2
    return _finite(stack, sums)


INFLUENCES = {"activation": _turns, "taylor": _losses}
"""What each block is worth, by `prune.importance`."""


def _finite(stack: _Stack, worth: list[float]) -> list[float]:
    for name, value in zip(stack.names, worth, strict=True):
        if not torch.isfinite(torch.tensor(value)):
            raise StageError(
                f"measuring the influence of {name}",
                found=f"{value}: activations or gradients that are NaN or infinite",
                expected="finite ones on the calibration data",
            )
    return worth


def _prove(module: nn.Module, stack: _Stack, gone: list[int], example: dict[str, Tensor]) -> None:
    """That the model without the blocks equals the one that skips them, and so does what its checkpoint becomes.

    Raises:
        StageError: it does not.
    """

    def skip(_number: int, taken: Tensor, output: Any) -> Any:
        return (taken, *output[1:]) if isinstance(output, tuple | list) else taken

    with _watched(stack, gone, skip):
        masked = module(**example)
    cut, rebuilt = sketch(module), sketch(module)
    drop_layers_(cut, gone)
    found = unequal(cut, example, masked)
    if found:
        raise StageError(
            f"comparing the model without {', '.join(stack.names[number] for number in gone)} with the one that skips "
            "them",
            found=found,
            expected="equal outputs: blocks that do the same wherever they stand",
            fix="name the blocks that depend on their place in prune.ignore, or remove other structures",
        )
    found = unlike(module, gone)
    if not found:
        fit_module(rebuilt, cut.state_dict())
        rebuilt.load_state_dict(cut.state_dict(), assign=True)
        found = unequal(rebuilt, example, masked)
    if found:
        raise StageError(
            "rebuilding the model without the blocks from its tensors",
            found=found,
            expected="blocks that differ in their tensors alone: a checkpoint has the first blocks of the source",
            fix="name the blocks that are not like the others in prune.ignore, or remove other structures",
        )


def _outcome(
    stack: _Stack,
    before: dict[str, list[int]],
    gone: list[int],
    kept: list[int],
    worth: list[float],
    refitted: list[int],
) -> Outcome:
    def parameters(numbers: Collection[int]) -> dict[str, list[int]]:
        prefixes = tuple(f"{stack.names[number]}." for number in numbers)
        return {name: shape for name, shape in before.items() if name.startswith(prefixes)}

    removed = parameters(gone)
    return Outcome(
        eligible_parameters=_count(parameters(range(len(stack.names)))),
        touched_parameters=_count(removed),
        tensors=[TensorChange(name=name, before=shape, after=[0]) for name, shape in removed.items()],
        kept_layers=kept,
        influences=worth,
        refitted_layers=refitted,
    )


def _count(shapes: dict[str, list[int]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())
