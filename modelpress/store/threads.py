"""Threads that wait on a network without holding up the end of the process."""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")


class ClosedError(RuntimeError):
    """The pool was shut down and takes no more."""


class DaemonPool(Executor):
    """A pool like `ThreadPoolExecutor`, whose threads are daemons.

    Python waits at its end for every thread of a `ThreadPoolExecutor`, and so for as long as a silent server keeps one
    waiting; it does not wait for these. The threads end with the pool: at `shutdown`, or when nobody holds it any more.
    """

    def __init__(self, workers: int, name: str) -> None:
        self._workers, self._name = workers, name
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: set[Future[Any]] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._ended = weakref.finalize(self, _end, self._tasks, workers)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run `fn` in a thread of the pool.

        Raises:
            ClosedError: the pool was shut down.
        """
        future: Future[T] = Future()

        def task() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001  handed over whole to whoever asks for the result
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._lock:
            if not self._ended.alive:
                raise ClosedError(f"the pool {self._name!r} was shut down")
            self._waiting.add(future)
            self._tasks.put(task)
            if len(self._threads) < self._workers:
                name = f"{self._name}_{len(self._threads)}"
                self._threads.append(threading.Thread(target=_work, args=(self._tasks,), name=name, daemon=True))
                self._threads[-1].start()
        future.add_done_callback(self._waiting.discard)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more; cancel what has not begun if asked; wait for the rest if asked."""
        with self._lock:
            self._ended()
        if cancel_futures:
            for future in list(self._waiting):
                future.cancel()
        if wait:
            for thread in self._threads:
                thread.join()


def ahead(
    pool: Executor,
    work: Callable[[S], T],
    items: Iterator[S],
    most: int,
    unused: Callable[[S], object] = lambda _: None,
) -> Iterator[T]:
    """`map` in a pool, in order, with at most `most` items taken ahead (so memory is bounded).

    `unused` gets every item that was taken and whose work will not run, because other work failed. An item goes to
    `work` or to `unused`, and never to both, wherever an interrupt strikes.
    """
    waiting: deque[Future[T]] = deque()
    turns: deque[list[S]] = deque()  # the item of each: whoever pops it has it, and popping is one step

    def take(turn: list[S]) -> T:
        return work(turn.pop())

    try:
        for item in items:
            turns.append([item])
            waiting.append(pool.submit(take, turns[-1]))
            if len(waiting) >= most:
                yield waiting.popleft().result()
                turns.popleft()
        while waiting:
            yield waiting.popleft().result()
            turns.popleft()
    finally:
        for turn in turns:
            with contextlib.suppress(IndexError):  # its work has it
                unused(turn.pop())
        for future in waiting:
            future.cancel()


def _work(tasks: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (task := tasks.get()) is not None:
        task()
        del task  # what it held may go while this thread waits


def _end(tasks: queue.SimpleQueue[Callable[[], None] | None], workers: int) -> None:
    for _ in range(workers):
        tasks.put(None)
