"""Threads for loops that give up the interpreter's lock; they stay up between tensors, as starting them takes longer
than decoding a small one."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

MOST_THREADS = 64
"""More are asked for by nobody who has not so many cores; their parts wait for a thread."""

T = TypeVar("T")


def share(work: Callable[[T], None], parts: Sequence[T]) -> None:
    """Call `work` with every part, up to MOST_THREADS and one at a time; returns when all are done.

    The first runs on the caller's thread. `work` must not call this function itself: its parts would wait for threads
    that wait for them. Raises what `work` raised for the first part for which it did; the others are done by then too.
    """
    others = [_pool().submit(work, part) for part in parts[1:]]
    try:
        if parts:
            work(parts[0])
    finally:
        wait(others)
    for other in others:
        other.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    # A fork has none of its parent's threads: the child makes its own.
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_pool.cache_clear)
    return ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="decode")
