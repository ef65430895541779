"""How long work reports that it moves: one callable, passed down from whoever shows it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called by stages often and cheaply; a terminal bar, a Prefect artifact or nothing stands behind it."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """`done` of `total` units are finished; `note` says of what ("epoch 3: loss 0.21")."""


def silent(done: int, total: int, note: str = "") -> None:
    """Show nothing."""
