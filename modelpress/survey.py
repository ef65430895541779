"""How a module calls its layers: in which order, on which inputs, and whether its blocks are a chain."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modelpress.distill import frozen
from modelpress.errors import StageError
from modelpress.moments import input_of, rows_seen, unreadable
from modelpress.residence import blocks_of
from modelpress.workload import Batch

MOST_STEPS = 8
"""Inputs of one block that are measured one after the other; of more (experts), several are measured at once."""

FIRST = -1
"""Group of the layers outside the blocks that run before them, and of weights that several groups share."""

Arguments = dict[int | str, Any]
"""A call's arguments by position or name."""


def arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """What a hook was told of a call."""
    given: Arguments = dict(enumerate(args))
    given.update(kwargs)
    return given


def first_output(output: Any) -> Any:
    """What a block hands on; beside it there may be attention weights or a cache."""
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


def moved(module: nn.Module, batch: Batch) -> Batch:
    """The batch where the module is."""
    device = next(module.parameters()).device
    if device.type == "meta":  # not in memory now; it is computed where the data are
        return Batch(dict(batch.inputs))
    return Batch({name: tensor.to(device) for name, tensor in batch.inputs.items()})


@contextlib.contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    """Remove hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Step:
    """Layers that are measured in one pass over the data."""

    inputs: list[list[str]]
    """Names; those of one list read the same tensor in each call."""
    once: bool
    """Whether each was called exactly once in each batch."""

    @classmethod
    def of(cls, names: list[str]) -> Step:
        """One in which each layer has an input of its own."""
        return cls([[name] for name in names], once=False)


@dataclass
class Survey:
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
        self.counts = dict.fromkeys(self.layers, 0)
        self.often: set[str] = set()
        """Layers that a batch does not call, or more than once."""
        self.sources: dict[str, set[str]] = {name: set() for name in self.layers}
        """The first layer, in each call's pass, that read the same tensor."""
        self.read: tuple[Tensor, int, str] | None = None
        """What was read last, its version, and the first layer that read it."""
        self.first: Arguments = {}
        self.last: Any = None
        self.calls: list[nn.Module] = []

    def run(self, min_rows: int) -> None:
        """Run all batches.

        Raises:
            StageError: a layer that sees too few rows, or NaN or infinite ones.
        """
        calls: list[nn.Module] = []
        for index, batch in enumerate(self.batches):
            handles = self._watch_layers(batch.inputs.get("attention_mask"))
            handles += [block.register_forward_pre_hook(self._enter, with_kwargs=True) for block in self.listed]
            handles += [block.register_forward_hook(self._leave) for block in self.listed]
            with hooked(handles):
                self.module(**batch.inputs)
            self.often |= {name for name, count in self.counts.items() if count != index + 1}
            calls = self.calls if index == 0 else calls
            self.chained = self.chained and self.calls == calls
            self.calls, self.first, self.last, self.read = [], {}, None, None
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
                inputs = input_of(args, kwargs)
                self.rows[name] += rows_seen(used, name, inputs, output, mask)
                self.counts[name] += 1
                if self.read is None or self.read[0] is not inputs or self.read[1] != inputs._version:
                    self.read = inputs, inputs._version, name
                self.sources[name].add(self.read[2])

            return hook

        pairs = [(name, used) for name, found in self.users.items() for used in found]
        return [used.register_forward_hook(watch(name, used), with_kwargs=True) for name, used in pairs]

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = arguments(args, kwargs)
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
        self.last = first_output(output)

    def steps(self, members: list[str]) -> list[Step]:
        """The layers of one block by what they read, in the order of their calls."""
        inputs: list[list[str]] = []
        for name in members:
            first = inputs[-1][0] if inputs else ""
            same = self.sources[name] == {first} and not self.often & {name, first}
            if same and isinstance(self.layers[name], nn.Linear):
                inputs[-1].append(name)
            else:
                inputs.append([name])
        many = -(-len(inputs) // MOST_STEPS)
        steps = [inputs[start : start + many] for start in range(0, len(inputs), many)]
        return [Step(step, once=self.often.isdisjoint(name for names in step for name in names)) for step in steps]

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
        survey = Survey(module, {}, [moved(module, batch)])
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
