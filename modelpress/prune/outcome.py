"""What a pruner did: the report's rows, and how to keep it so while weights are updated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from modelpress.prune.masks import Masks
from modelpress.reports import TensorChange


def nothing() -> None:
    """Nothing has to be restored."""


@dataclass(frozen=True)
class Outcome:
    """Result of one method."""

    eligible_parameters: int
    """Parameters in the tensors that the method could touch."""
    touched_parameters: int
    """Parameters that the touched tensors had before."""
    tensors: list[TensorChange]
    """Each touched tensor."""
    hold: Callable[[], None] = nothing
    """Restores the zeros; called after each update of a recovery."""
    masks: Masks = field(default_factory=dict)
    """For methods that set weights to zero: where they stay."""
    kept_layers: list[int] = field(default_factory=list)
    """Blocks that stayed, by their numbers before; empty where none was removed."""
    influences: list[float] = field(default_factory=list)
    """Of each block before, where blocks were judged."""
    refitted_layers: list[int] = field(default_factory=list)
    """Those of the kept whose last linear layer was fitted to fill a gap."""
