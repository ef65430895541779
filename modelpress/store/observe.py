"""Watching what stores are asked: each operation as a block that somebody else times, traces or counts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
Observer = Callable[[str, str], AbstractContextManager[Any]]
"""Is told an operation's name and the store's URI; what it returns is open while the operation runs, in its thread."""

OPERATIONS = ("get", "read_into", "download", "put", "info", "delete")
"""What is watched. A listing is not: it is read while other things are done."""

_observers: list[Observer] = []


def watch(observer: Observer | None) -> None:
    """Let all stores of this process be watched by one observer; None: by nobody."""
    _observers[:] = [observer] if observer is not None else []


def watched(method: Callable[P, R]) -> Callable[P, R]:
    """A method of a store that tells the observer, if there is one."""

    @functools.wraps(method)
    def told(*args: P.args, **kwargs: P.kwargs) -> R:
        if not _observers:
            return method(*args, **kwargs)
        store: Any = args[0]
        with _observers[0](method.__name__, store.uri):
            return method(*args, **kwargs)

    return told
