"""Means over a batch of which only a part is here: the others are at other ranks, or come later.

A training takes the loss of each part times the part's share of the batch's samples, and adds them up. That is the loss
of the batch where it is a mean over samples. Other means, such as one over the tokens that a mask leaves, or a quotient
of two means, ask here for what the whole batch has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

from modelpress.errors import StageError
from modelpress.parallel.ranks import Ranks


@dataclass(frozen=True)
class Turn:
    """The part of a batch whose loss is being computed."""

    share: float
    """Its samples among the batch's; 0 for a stand-in, which a rank without samples computes to keep step."""
    parts: int
    """Into how many each rank cuts its samples."""
    ranks: Ranks | None


_current: ContextVar[Turn | None] = ContextVar("modelpress_turn", default=None)


def current() -> Turn | None:
    """The part whose loss is being computed; None where a batch is computed whole, in one process."""
    return _current.get()


@contextmanager
def taken(turn: Turn) -> Iterator[None]:
    """Losses within this block are of this part."""
    token = _current.set(turn)
    try:
        yield
    finally:
        _current.reset(token)


def partial_mean(total: Tensor, count: Tensor) -> Tensor:
    """What this part gives so that the parts' values, times their shares, add up to the batch's Σ total / Σ count.

    Args:
        total: scalar, with a gradient.
        count: scalar.

    Raises:
        StageError: the batch is taken in parts, and what the later ones count is not known yet.
    """
    turn = _whole_here()
    if turn is None:
        return total / count
    assert turn.ranks is not None
    (counted,) = turn.ranks.sum([float(count) if turn.share else 0.0])
    return total / (counted * turn.share) if turn.share else total * 0.0


def whole_mean(total: Tensor, count: Tensor) -> Tensor:
    """Σ total / Σ count over the batch, without a gradient.

    Raises:
        StageError: as `partial_mean` does.
    """
    turn = _whole_here()
    if turn is None:
        return total / count
    assert turn.ranks is not None
    here = 1.0 if turn.share else 0.0
    summed, counted = turn.ranks.sum([float(total.detach()) * here, float(count) * here])
    return total.detach() * 0.0 + summed / counted


def _whole_here() -> Turn | None:
    turn = _current.get()
    if turn is None or (turn.parts == 1 and turn.ranks is None):
        return None
    if turn.parts > 1:
        raise StageError(
            "taking a mean over a whole batch",
            found=f"a batch in {turn.parts} parts, one after another, and a mean that is none over samples",
            expected="the batch at once: hidden states are compared relative to its own, masked tokens counted in it",
            fix="set parallel.gradient_accumulation to 1 (more parallel.processes take fewer samples each), or the "
            "weight of the hidden states or of the attention to 0",
        )
    return turn
