"""Where a module's weights are while its layers are worked on, block by block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from modelpress.distill import layer_list
from modelpress.errors import WorkloadError
from modelpress.progress import Progress, silent


class Residence:
    """Where a module's weights are while it is worked on: in memory, all of them. `modelpress.blockwise` has another.

    Wherever they are, a forward pass of the module or of a block finds the weights that it needs.
    """

    at_once = True
    """Whether all weights, and what is as many, may be held at once."""

    def held(self, modules: Iterable[nn.Module]) -> AbstractContextManager[None]:  # noqa: ARG002
        """The weights of these modules are tensors that may be read and changed while this is open, and are kept."""
        return contextlib.nullcontext()

    def settle_(self, layer: nn.Module) -> None:
        """Bring a weight that was changed to what will be read again: fewer bits, where it is stored so."""

    def kept(self, scratch: Tensor) -> Tensor:
        """A tensor of this one's values that will be read, or added to, later: a block's outputs, second moments."""
        return scratch


IN_MEMORY = Residence()


def visit_(
    module: nn.Module,
    names: Sequence[str],
    visit: Callable[[str, nn.Module], None],
    *,
    progress: Progress = silent,
    residence: Residence = IN_MEMORY,
) -> None:
    """Call `visit` for each named layer once, block by block: for methods that need no data.

    Args:
        module: holds the layers.
        names: as `module.get_submodule` knows them.
        visit: may change the layer's weight in place, not its shape.
        progress: called once per block.
        residence: where the weights are.
    """
    home = {child: block for block in blocks_of(module) for child in block.modules()}
    groups: dict[nn.Module, list[str]] = {}
    for name in names:
        layer = module.get_submodule(name)
        groups.setdefault(home.get(layer, layer), []).append(name)
    with torch.no_grad():
        for index, (group, members) in enumerate(groups.items()):
            progress(index, len(groups), f"{len(members)} layers from {members[0]} on")
            with residence.held([group]):
                for name in members:
                    visit(name, module.get_submodule(name))
                    residence.settle_(module.get_submodule(name))
        progress(len(groups), len(groups), f"{len(names)} layers")


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The elements of the module's largest `nn.ModuleList`; none where it has no list."""
    try:
        return list(layer_list(module))
    except WorkloadError:
        return []
