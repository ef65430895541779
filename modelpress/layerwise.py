"""Second moments of the layers' inputs, block by block, while the blocks change: what one-shot methods work on.

The way of GPTQ (Frantar et al. 2022, arXiv:2210.17323) and SparseGPT (arXiv:2301.00774): run the first block on
calibration data, gather H = Σ x xᵀ of each of its layers' inputs, let the caller change the weights, run the *changed*
block once more for the inputs of the next. Within a block it goes from input to input: layers that read the same
tensor share its statistics, and what reads the changed layers' outputs is measured after they changed. Beyond the
model, one block's inputs and one input's statistics are held at a time.

The blocks are the elements of the module's largest `nn.ModuleList`, in the order of their calls; a module without one
(a convolutional network) is one block. Where a block takes more from its surroundings than the block before it gave and
what the first block took (a residual sum outside the blocks, a mask of its own, a cache), its statistics come from
forward passes of the whole module: the same numbers, only slower.

The module need not be in memory: a `Residence` says where its weights are, and what is worked on is asked of it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelpress.distill import frozen
from modelpress.errors import StageError
from modelpress.moments import Moments, input_of, unreadable
from modelpress.progress import Progress, silent
from modelpress.residence import IN_MEMORY, Residence
from modelpress.survey import Arguments, Step, Survey, arguments, first_output, hooked, moved, users
from modelpress.workload import Batch


@dataclass(frozen=True)
class LayerInputs:
    """What a layer saw on the calibration data."""

    name: str
    """The layer's name in the module."""
    layer: nn.Module
    """`nn.Linear`, `nn.Conv1d` or `nn.Conv2d`; its weight may be changed in place."""
    second_moment: Tensor
    """H = Σ x xᵀ, (features, features) on the weight's device, the features in the order of the columns of the weight
    as (outputs, features). Layers that read the same share it; what is above its diagonal may be overwritten."""
    rows: int
    """Inputs in the sum: tokens that are not padding, or positions of a convolution."""


Visit = Callable[[LayerInputs], None]


def walk_(
    module: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    visit: Visit,
    *,
    min_rows: int = 1,
    progress: Progress = silent,
    residence: Residence = IN_MEMORY,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Call `visit` for each named layer once, with statistics that include what earlier visits changed.

    Layers of one block that read the same tensor are visited together, in the order of their calls, with statistics
    from before the first of them changed; so are all layers outside the blocks that run before them, which come first,
    and the others, which come last. A weight that several modules share is to be named once; its statistics are those
    of all of them, and where they stand in several blocks (or one is an embedding) it is visited first. Positions that
    a batch's `attention_mask` (batch, length) leaves out do not count in layers whose inputs are (batch, length,
    features) or (batch · length, features).

    One forward pass over all batches comes before the first visit, so that what is wrong with the data is found while
    the module is still as it was. The module runs in eval mode and comes back in its own.

    Args:
        module: takes `Batch.inputs` as keyword arguments.
        names: layers as `module.get_submodule` knows them.
        batches: calibration data.
        visit: may change the layer's weight in place, not its shape.
        min_rows: fewest rows that a layer must see.
        progress: called once per group of layers.
        residence: where the weights are.
        dtype: of the second moments; whoever inverts them needs float64.

    Raises:
        StageError: a layer that cannot be treated, that no batch reaches or too few rows do, or whose inputs are NaN or
            infinite (before or, where visits break the module, after changes). It is named.
    """
    if not names:
        return
    layers = {name: module.get_submodule(name) for name in names}
    for name, layer in layers.items():
        if obstacle := unreadable(layer):
            raise StageError(
                f"computing the moments of the inputs of {name}",
                found=f"a layer that {obstacle}",
                expected="a linear or an ungrouped convolution layer",
                fix="name it in `ignore`",
            )
    with torch.no_grad(), frozen(module):
        survey = Survey(module, layers, [moved(module, batch) for batch in batches])
        survey.run(min_rows)
        groups = survey.groups()
        inside = [group for group in groups if 0 <= group < len(survey.blocks)]
        chain = _Chain(survey.blocks, survey.slot, survey.batches, residence) if survey.chained else None
        for index, (group, members) in enumerate(groups.items()):
            progress(index, len(groups), f"{len(members)} layers from {members[0]} on")
            block = survey.blocks[group] if group in inside else None
            if block is None:
                moments = _whole(module, Step.of(members), survey.batches, dtype, None)
                with residence.held([layers[name] for name in members]):
                    _visit_each(layers, moments, visit, residence)
                continue
            if chain is not None:
                chain.reach(module, group)
            with residence.held([block]):
                for step in survey.steps(members):
                    if chain is None:
                        moments = _whole(module, step, survey.batches, dtype, block)
                    else:
                        moments = chain.moments(module, step, dtype)
                    _visit_each(layers, moments, visit, residence)
                if chain is not None and group != inside[-1]:
                    chain.advance()
        progress(len(groups), len(groups), f"{len(layers)} layers")


def _visit_each(layers: dict[str, nn.Module], moments: dict[str, Moments], visit: Visit, residence: Residence) -> None:
    """The layers of one step; the statistics of each are let go when it is done, as together they outweigh a block."""
    for name in list(moments):
        statistics = moments.pop(name)
        visit(LayerInputs(name, layers[name], statistics.sum, statistics.rows))
        residence.settle_(layers[name])


class _Done(Exception):  # noqa: N818 - no error: it ends a forward pass that has shown what it should
    """The rest of the forward pass is not needed."""


@contextlib.contextmanager
def observed(
    module: nn.Module, moments: dict[str, Moments], mask: list[Tensor | None], waiting: set[str] | None = None
) -> Iterator[None]:
    """Add the inputs of each named layer, and of those that share its weight, to its `Moments` while this is open.

    Args:
        module: holds the layers.
        moments: by the layers' names.
        mask: one element, the present batch's `attention_mask`.
        waiting: names whose inputs are still to come; with the last of them the forward pass ends by `_Done`.
    """

    def observe(name: str) -> Any:
        def hook(used: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if unreadable(used):
                return
            moments[name].add(input_of(args, kwargs), mask[0])
            if waiting is not None:
                waiting.discard(name)
                if not waiting:
                    raise _Done

        return hook

    pairs = [(name, used) for name in moments for used in users(module, module.get_submodule(name))]
    with hooked([used.register_forward_pre_hook(observe(name), with_kwargs=True) for name, used in pairs]):
        yield


def _measured(
    module: nn.Module,
    step: Step,
    calls: Iterable[tuple[Batch, Callable[[], Any]]],
    dtype: torch.dtype,
    residence: Residence,
) -> dict[str, Moments]:
    """Statistics of a step's layers from one call per batch, ended where their inputs are known."""
    first = {names[0]: Moments(module.get_submodule(names[0]), names[0], dtype=dtype) for names in step.inputs}
    for one in first.values():
        one.sum = residence.kept(one.sum)
    mask: list[Tensor | None] = [None]
    waiting: set[str] | None = set() if step.once else None
    with observed(module, first, mask, waiting):
        for batch, call in calls:
            mask[0] = batch.inputs.get("attention_mask")
            if waiting is not None:
                waiting.update(first)
            with contextlib.suppress(_Done):
                call()
    return {name: first[names[0]] for names in step.inputs for name in names}


def _whole(
    module: nn.Module, step: Step, batches: Sequence[Batch], dtype: torch.dtype, last: nn.Module | None
) -> dict[str, Moments]:
    """Statistics from forward passes of the whole module, each ended after the block `last` at the latest."""

    def stop(*_: Any) -> None:
        raise _Done

    calls = ((batch, functools.partial(module, **batch.inputs)) for batch in batches)
    with hooked([last.register_forward_hook(stop)] if last is not None else []):
        return _measured(module, step, calls, dtype, IN_MEMORY)


class _Chain:
    """The blocks one after the other, each on the outputs of the one before it."""

    def __init__(
        self, blocks: list[nn.Module], slot: int | str | None, batches: list[Batch], residence: Residence
    ) -> None:
        self.blocks, self.slot, self.batches, self.residence = blocks, slot, batches, residence
        self.calls: list[Arguments] = []
        """Arguments of the present block, per batch."""
        self.position = 0

    def reach(self, module: nn.Module, index: int) -> None:
        """Go on to a block."""
        if not self.calls:
            self._capture(module)
        while self.position < index:
            self.advance()

    def moments(self, module: nn.Module, step: Step, dtype: torch.dtype) -> dict[str, Moments]:
        """Statistics of some of the present block's layers."""
        block = self.blocks[self.position]
        calls = (
            (batch, functools.partial(_call, block, _kept(call)))
            for batch, call in zip(self.batches, self.calls, strict=True)
        )
        return _measured(module, step, calls, dtype, self.residence)

    def advance(self) -> None:
        """Run the present block, changed as it may be, for the next one's inputs."""
        with self.residence.held([self.blocks[self.position]]):  # once for all batches
            for call in self.calls:
                assert self.slot is not None
                output = first_output(_call(self.blocks[self.position], _kept(call)))
                call[self.slot] = self.residence.kept(output)
        self.position += 1

    def _capture(self, module: nn.Module) -> None:
        """Arguments of the first block, once what runs before it has changed."""

        def keep(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = arguments(args, kwargs)
            if self.slot is not None:
                call[self.slot] = self.residence.kept(call[self.slot])
            self.calls.append(call)
            raise _Done

        with hooked([self.blocks[0].register_forward_pre_hook(keep, with_kwargs=True)]):
            for batch in self.batches:
                with contextlib.suppress(_Done):
                    module(**batch.inputs)


def _kept(call: Arguments) -> Arguments:
    """The same arguments, for a block that may change its own in place: each call is used twice."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in call.items()}


def _call(block: nn.Module, call: Arguments) -> Any:
    positions = sum(1 for key in call if isinstance(key, int))
    named = {key: value for key, value in call.items() if isinstance(key, str)}
    return block(*(call[position] for position in range(positions)), **named)
