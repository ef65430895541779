"""How a model falls into what runs before its blocks, the blocks, and what runs after them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelpress.distill import frozen
from modelpress.errors import StageError
from modelpress.survey import Arguments, arguments, chain_of, first_output, hooked
from modelpress.workload import Batch


@dataclass(frozen=True)
class Outline:
    """A model as a chain: what makes the first hidden state, the blocks, what makes the answer of the last one."""

    blocks: tuple[str, ...]
    """Names of the blocks, in the order of their calls."""
    slot: int | str
    """Argument by which a block takes what the one before it gave."""
    gives: int | None
    """Where blocks give a tuple with the hidden state in front: how long it is. None: the tensor alone."""
    before: tuple[str, ...]
    """Modules with parameters of their own that run before the first block alone, the outermost of each."""
    after: tuple[str, ...]
    """Those that run after the last block alone, and those that never ran."""
    shapes: dict[str, tuple[int, ...]]
    """What each of `before` gave for the example, and the first block took (under its name)."""
    shared: tuple[str, ...]
    """Those that run on both sides of a block, or inside several: every part keeps them."""

    def parameters(self, module: nn.Module, bounds: tuple[int, ...], part: int) -> dict[str, Tensor]:
        """The parameters and buffers that a part holds, by their names in the whole model; a tied one under each.

        Args:
            module: the whole model.
            bounds: of the parts, see `Partition`.
            part: which.
        """
        gone = set(self.foreign(bounds, part))
        return {
            name: tensor
            for name, tensor in module.state_dict(keep_vars=True).items()
            if not any(name == one or name.startswith(f"{one}.") for one in gone)
        }

    def foreign(self, bounds: tuple[int, ...], part: int) -> list[str]:
        """The modules that a part does without, by name."""
        first, last = bounds[part], bounds[part + 1]
        gone = [name for number, name in enumerate(self.blocks) if not first <= number < last]
        gone += self.before if first > 0 else ()
        gone += self.after if last < len(self.blocks) else ()
        return gone


def outline(module: nn.Module, inputs: Mapping[str, Tensor]) -> Outline:
    """Run the model once on an example, and see what runs where.

    Args:
        module: takes the inputs as keyword arguments; its blocks stand in its largest `nn.ModuleList`.
        inputs: an example, (batch, …) each, at least two samples, so that the axis of samples can be told.

    Raises:
        StageError: the blocks are no chain (see `survey.chain_of`); what was found is named.
    """
    blocks, slot = chain_of(module, Batch(dict(inputs)))
    names = {child: name for name, child in module.named_modules()}
    inside = {child for block in blocks for child in block.modules()}
    owners = [
        (name, child)
        for name, child in module.named_modules()
        if child not in inside and next(child.parameters(recurse=False), None) is not None
    ]
    watch = _Watch(blocks)
    watch.run(module, inputs, [child for _, child in owners])
    sides: dict[str, list[str]] = {"before": [], "after": [], "shared": []}
    for name, child in owners:
        side = watch.side(child)
        if not any(name.startswith(f"{one}.") or one == "" for one in sides[side]):  # its owner goes as a whole
            sides[side].append(name)
    found = _hidden_state(watch, slot, names[blocks[0]])
    shapes = {name: watch.shapes[child] for name, child in owners if child in watch.shapes}
    return Outline(
        tuple(names[block] for block in blocks),
        slot,
        watch.gives,
        tuple(sides["before"]),
        tuple(sides["after"]),
        shapes | {names[blocks[0]]: tuple(found.shape)},
        tuple(sides["shared"]),
    )


class _Watch:
    """Which modules are called before the first block, after the last, or in between; one forward pass."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.blocks = blocks
        self.phase = 0
        """0: no block was entered; 1: some were; 2: the last one was left."""
        self.seen: dict[nn.Module, set[int]] = {}
        self.shapes: dict[nn.Module, tuple[int, ...]] = {}
        self.taken: Arguments = {}
        self.gives: int | None = None
        self.given: Any = None

    def run(self, module: nn.Module, inputs: Mapping[str, Tensor], owners: list[nn.Module]) -> None:
        """Look once."""

        def enter(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.taken, self.phase = arguments(args, kwargs), 1

        def leave(_block: nn.Module, _args: object, output: Any) -> None:
            self.gives, self.phase = len(output) if isinstance(output, tuple | list) else None, 2
            self.given = first_output(output)

        def begin(child: nn.Module, _args: object) -> None:
            self.seen.setdefault(child, set()).add(self.phase)

        def end(child: nn.Module, _args: object, output: Any) -> None:
            self.seen[child].add(self.phase)
            if isinstance(gave := first_output(output), Tensor):
                self.shapes[child] = tuple(gave.shape)

        handles: list[Any] = [self.blocks[0].register_forward_pre_hook(enter, with_kwargs=True)]
        handles += [self.blocks[-1].register_forward_hook(leave)]
        handles += [child.register_forward_pre_hook(begin) for child in owners]
        handles += [child.register_forward_hook(end) for child in owners]
        with torch.no_grad(), frozen(module), hooked(handles):
            module(**inputs)

    def side(self, child: nn.Module) -> str:
        """Where a module belongs."""
        phases = self.seen.get(child, {2})
        return "before" if phases == {0} else "after" if phases == {2} else "shared"


def _hidden_state(watch: _Watch, slot: int | str, name: str) -> Tensor:
    found, given = watch.taken.get(slot), watch.given
    if not (isinstance(found, Tensor) and isinstance(given, Tensor) and found.shape == given.shape):
        raise StageError(
            f"looking at what {name} takes, and what the last block gives",
            found=f"{list(getattr(found, 'shape', []))} and {list(getattr(given, 'shape', []))}",
            expected="tensors of one shape: what parts of a pipeline send each other",
        )
    return found
