"""Where a training keeps its state while it runs, so that one that was killed goes on from there.

Whoever runs a stage says so around it, `with kept_on(shelf): distill(...)`, and every training inside puts its state on
that shelf. Between the two stand functions that have nothing to do with it, and the user's own `Workload.source`; a
context variable spares them an argument each. Without a shelf nothing is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol


class Shelf(Protocol):
    """Keeps states by number: 0 for the first training of a stage, 1 for the second."""

    seconds: float
    """Least time between two states of a training; 0 keeps one after each update."""

    def load(self, number: int) -> bytes | None:
        """The newest state under this number; None where there is none."""

    def save(self, number: int, data: bytes) -> None:
        """Keep a state, whole or not at all, in place of the one before."""

    def tell(self, text: str) -> None:
        """Say where a training went on, or why what is kept is not used."""


@dataclass(frozen=True)
class Place:
    """The place of one training on a shelf."""

    shelf: Shelf
    number: int

    def load(self) -> bytes | None:
        """See `Shelf.load`."""
        return self.shelf.load(self.number)

    def save(self, data: bytes) -> None:
        """See `Shelf.save`."""
        self.shelf.save(self.number, data)


@dataclass
class _Open:
    """A shelf, and how many trainings have begun on it."""

    shelf: Shelf
    begun: int = 0


_open: ContextVar[_Open | None] = ContextVar("modelpress-shelf", default=None)


@contextmanager
def kept_on(shelf: Shelf) -> Iterator[None]:
    """Trainings within this block keep their state on `shelf`, and go on from what is there.

    Two runs of a block find each other's states by the order in which it trains: that order must be the same.
    """
    token = _open.set(_Open(shelf))
    try:
        yield
    finally:
        _open.reset(token)


def open_shelf() -> Shelf | None:
    """The shelf of the block that this is in; None where nobody keeps any."""
    found = _open.get()
    return found.shelf if found is not None else None


def next_place() -> Place | None:
    """The place of the training that begins now; None where nobody keeps any."""
    found = _open.get()
    if found is None:
        return None
    found.begun += 1
    return Place(found.shelf, found.begun - 1)
