"""Second moments of the layers' inputs, block by block, while the blocks change: what one-shot methods work on.

The way of GPTQ (Frantar et al. 2022, arXiv:2210.17323) and SparseGPT (arXiv:2301.00774): run the first block on
calibration data, gather H = Σ x xᵀ of each of its layers' inputs, let the caller change the weights, run the *changed*
block once more for the inputs of the next. Beyond the model, one block's inputs and statistics are held at a time.

The blocks are the elements of the module's largest `nn.ModuleList`, in the order of their calls; a module without one
(a convolutional network) is one block. Where a block takes more from its surroundings than the block before it gave and
what the first block took (a residual sum outside the blocks, a mask of its own, a cache), its statistics come from
forward passes of the whole module: the same numbers, only slower.

The module need not be in memory: a `Residence` says where its weights are, and what is worked on is asked of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modelpress.distill import frozen
from modelpress.errors import StageError
from modelpress.moments import Moments, input_of, rows_seen, unreadable
from modelpress.progress import Progress, silent
from modelpress.residence import IN_MEMORY, Residence, blocks_of
from modelpress.workload import Batch

FIRST = -1
"""Group of the layers outside the blocks that run before them, and of weights that several groups share."""


@dataclass(frozen=True)
class LayerInputs:
    """What a layer saw on the calibration data."""

    name: str
    """The layer's name in the module."""
    layer: nn.Module
    """`nn.Linear`, `nn.Conv1d` or `nn.Conv2d`; its weight may be changed in place."""
    second_moment: Tensor
    """H = Σ x xᵀ, (features, features) float64 on the weight's device, the features in the order of the columns of the
    weight as (outputs, features)."""
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
) -> None:
    """Call `visit` for each named layer once, with statistics that include what earlier visits changed.

    Layers of one block are visited together, in the order of their calls, with statistics from before the first of
    them changed. Layers outside the blocks that run before them come first, the others last. A weight that several
    modules share is to be named once; its statistics are those of all of them, and where they stand in several blocks
    (or one is an embedding) it is visited first. Positions that a batch's `attention_mask` (batch, length) leaves out
    do not count in layers whose inputs are (batch, length, features) or (batch · length, features).

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
        survey = _Survey(module, layers, [_moved(module, batch) for batch in batches])
        survey.run(min_rows)
        groups = survey.groups()
        inside = [group for group in groups if 0 <= group < len(survey.blocks)]
        chain = _Chain(survey.blocks, survey.slot, survey.batches, residence) if survey.chained else None
        for index, (group, members) in enumerate(groups.items()):
            progress(index, len(groups), f"{len(members)} layers from {members[0]} on")
            block = survey.blocks[group] if group in inside else None
            if block is None or chain is None:
                moments = _whole(module, members, survey.batches, block)
                with residence.held([layers[name] for name in members] if block is None else [block]):
                    _visit_each(layers, moments, visit, residence)
                continue
            chain.reach(module, group)
            with residence.held([block]):
                _visit_each(layers, chain.moments(module, members), visit, residence)
                if group != inside[-1]:
                    chain.advance()
        progress(len(groups), len(groups), f"{len(layers)} layers")


def _visit_each(layers: dict[str, nn.Module], moments: dict[str, Moments], visit: Visit, residence: Residence) -> None:
    """The layers of one group; the statistics of each are let go when it is done, as together they outweigh a block."""
    for name in list(moments):
        statistics = moments.pop(name)
        visit(LayerInputs(name, layers[name], statistics.sum, statistics.rows))
        residence.settle_(layers[name])


def _moved(module: nn.Module, batch: Batch) -> Batch:
    device = next(module.parameters()).device
    if device.type == "meta":  # not in memory now; it is computed where the data are
        return Batch(dict(batch.inputs))
    return Batch({name: tensor.to(device) for name, tensor in batch.inputs.items()})


class _Done(Exception):  # noqa: N818 - no error: it ends a forward pass that has shown what it should
    """The rest of the forward pass is not needed."""


@contextlib.contextmanager
def _hooked(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


Arguments = dict[int | str, Any]
"""A call's arguments by position or name."""


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    given: Arguments = dict(enumerate(args))
    given.update(kwargs)
    return given


def _first_output(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) else output


def _same(value: Any, other: Any) -> bool:
    """Whether two arguments are equal and hold no state that a call could change."""
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return value is other or (value.shape == other.shape and torch.equal(value, other))
    if isinstance(value, tuple | list) and isinstance(other, tuple | list):
        return len(value) == len(other) and all(map(_same, value, other))
    return (
        (value is None or isinstance(value, bool | int | float | str)) and type(value) is type(other) and value == other
    )


@dataclass
class _Survey:
    """One pass over all batches: the order of the calls, the rows, and whether the blocks are a chain."""

    module: nn.Module
    layers: dict[str, nn.Module]
    batches: list[Batch]
    blocks: list[nn.Module] = field(default_factory=list)
    """In the order of their calls; none where one is called more than once or the module has none."""
    chained: bool = True
    slot: int | str | None = None
    """Argument by which a block takes the output of the one before it; None where there is just one block."""

    def __post_init__(self) -> None:
        self.listed = blocks_of(self.module)
        self.users = {name: users(self.module, layer) for name, layer in self.layers.items()}
        self.order: dict[nn.Module, int] = {}
        self.rows = dict.fromkeys(self.layers, 0)
        self.first: Arguments = {}
        self.last: Any = None
        self.calls: list[nn.Module] = []

    def run(self, min_rows: int) -> None:
        calls: list[nn.Module] = []
        for index, batch in enumerate(self.batches):
            handles = self._watch_layers(batch.inputs.get("attention_mask"))
            handles += [block.register_forward_pre_hook(self._enter, with_kwargs=True) for block in self.listed]
            handles += [block.register_forward_hook(self._leave) for block in self.listed]
            with _hooked(handles):
                self.module(**batch.inputs)
            calls = self.calls if index == 0 else calls
            self.chained = self.chained and self.calls == calls
            self.calls, self.first, self.last = [], {}, None
        for name, rows in self.rows.items():
            if rows < max(1, min_rows):
                raise StageError(
                    f"computing the moments of the inputs of {name}",
                    found=f"{rows} rows from {sum(map(len, self.batches))} calibration samples" if rows else "no call",
                    expected=f"at least {max(1, min_rows)} rows",
                    fix="raise workload.calibration_samples" if rows else "name it in `ignore`: no input reaches it",
                )
        if len(set(calls)) == len(calls):
            self.blocks = calls
        self.chained = self.chained and bool(self.blocks)

    def _watch_layers(self, mask: Tensor | None) -> list[Any]:
        def watch(name: str, used: nn.Module) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
                self.order.setdefault(used, len(self.order))
                if unreadable(used):
                    return  # an embedding that shares the weight
                self.rows[name] += rows_seen(used, name, input_of(args, kwargs), output, mask)

            return hook

        pairs = [(name, used) for name, found in self.users.items() for used in found]
        return [used.register_forward_hook(watch(name, used), with_kwargs=True) for name, used in pairs]

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = _arguments(args, kwargs)
        if not self.calls:
            self.first = given
            self.order.setdefault(block, len(self.order))
        else:
            slots = [key for key, value in given.items() if value is self.last]
            fits = len(slots) == 1 and self.slot in (None, slots[0]) and given.keys() == self.first.keys()
            self.slot = slots[0] if slots else None
            fits = fits and all(_same(value, self.first[key]) for key, value in given.items() if key != self.slot)
            self.chained = self.chained and fits
        self.calls.append(block)

    def _leave(self, _block: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        self.last = _first_output(output)

    def groups(self) -> dict[int, list[str]]:
        """Layers by group (`FIRST`, the blocks' numbers, the number of blocks for the rest), in the order of visits."""
        home = {child: index for index, block in enumerate(self.blocks) for child in block.modules()}
        start = self.order[self.blocks[0]] if self.blocks else len(self.order)
        found: dict[int, list[str]] = {index: [] for index in range(FIRST, len(self.blocks) + 1)}
        called = {name: [used for used in used_by if used in self.order] for name, used_by in self.users.items()}
        for name in sorted(self.layers, key=lambda name: min(self.order[used] for used in called[name])):
            homes = {home.get(used, FIRST if self.order[used] < start else len(self.blocks)) for used in called[name]}
            found[homes.pop() if len(homes) == 1 else FIRST].append(name)
        return {group: members for group, members in found.items() if members}


def chain_of(module: nn.Module, batch: Batch) -> tuple[list[nn.Module], int | str]:
    """The blocks in the order of their calls, and the argument by which each takes what the one before it gave.

    Raises:
        StageError: the module has no blocks, or they are no chain in which all else that each takes is the same.
    """
    with torch.no_grad(), frozen(module):
        survey = _Survey(module, {}, [_moved(module, batch)])
        survey.run(1)
    found = ""
    if not survey.listed:
        found = "no torch.nn.ModuleList"
    elif len(survey.blocks) != len(survey.listed):
        found = "blocks that are not called exactly once, or not in a list that holds nothing else"
    elif survey.blocks != survey.listed:
        found = "blocks that are called in another order than they stand in"
    elif len(survey.blocks) > 1 and not survey.chained:
        found = "blocks that take more than what the one before gave and what the first took, or not just that"
    elif survey.slot is None:
        found = f"{len(survey.blocks)} block"
    if found or survey.slot is None:
        raise StageError(
            f"looking for the blocks of {type(module).__name__}",
            found=found,
            expected="a chain of at least two blocks in a torch.nn.ModuleList, each on the outputs of the one before",
            fix="remove other structures, or name the module as a student's own architecture: distill.architecture",
        )
    return survey.blocks, survey.slot


def users(module: nn.Module, layer: nn.Module) -> list[nn.Module]:
    """All modules that hold a layer's weight as theirs."""
    return [child for child in module.modules() if getattr(child, "weight", None) is layer.weight]


@contextlib.contextmanager
def observed(module: nn.Module, moments: dict[str, Moments], mask: list[Tensor | None]) -> Iterator[None]:
    """Add the inputs of each named layer, and of those that share its weight, to its `Moments` while this is open.

    Args:
        module: holds the layers.
        moments: by the layers' names.
        mask: one element, the present batch's `attention_mask`.
    """

    def observe(name: str) -> Any:
        def hook(used: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not unreadable(used):
                moments[name].add(input_of(args, kwargs), mask[0])

        return hook

    pairs = [(name, used) for name in moments for used in users(module, module.get_submodule(name))]
    with _hooked([used.register_forward_pre_hook(observe(name), with_kwargs=True) for name, used in pairs]):
        yield


def _whole(module: nn.Module, names: list[str], batches: Sequence[Batch], last: nn.Module | None) -> dict[str, Moments]:
    """Statistics from forward passes of the whole module, each ended after the block `last`."""

    def stop(*_: Any) -> None:
        raise _Done

    moments = {name: Moments(module.get_submodule(name), name) for name in names}
    mask: list[Tensor | None] = [None]
    with observed(module, moments, mask), _hooked([last.register_forward_hook(stop)] if last is not None else []):
        for batch in batches:
            mask[0] = batch.inputs.get("attention_mask")
            with contextlib.suppress(_Done):
                module(**batch.inputs)
    return moments


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

    def moments(self, module: nn.Module, names: list[str]) -> dict[str, Moments]:
        """Statistics of the present block's layers."""
        moments = {name: Moments(module.get_submodule(name), name) for name in names}
        for one in moments.values():
            one.sum = self.residence.kept(one.sum)
        mask: list[Tensor | None] = [None]
        with observed(module, moments, mask):
            for batch, call in zip(self.batches, self.calls, strict=True):
                mask[0] = batch.inputs.get("attention_mask")
                _call(self.blocks[self.position], _kept(call))
        return moments

    def advance(self) -> None:
        """Run the present block, changed as it may be, for the next one's inputs."""
        with self.residence.held([self.blocks[self.position]]):  # once for all batches
            for call in self.calls:
                assert self.slot is not None
                output = _first_output(_call(self.blocks[self.position], _kept(call)))
                call[self.slot] = self.residence.kept(output)
        self.position += 1

    def _capture(self, module: nn.Module) -> None:
        """Arguments of the first block, once what runs before it has changed."""

        def keep(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = _arguments(args, kwargs)
            if self.slot is not None:
                call[self.slot] = self.residence.kept(call[self.slot])
            self.calls.append(call)
            raise _Done

        with _hooked([self.blocks[0].register_forward_pre_hook(keep, with_kwargs=True)]):
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
