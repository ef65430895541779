"""The pool whose threads nobody waits for."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future
from typing import Any

import pytest

from modelpress.store.threads import ClosedError, DaemonPool, ahead


def test_results_and_errors_reach_the_caller() -> None:
    pool = DaemonPool(3, "t")
    assert list(pool.map(lambda n: n * n, range(50))) == [n * n for n in range(50)]
    with pytest.raises(ZeroDivisionError):
        pool.submit(lambda: 1 // 0).result()
    assert pool.submit(len, "abc").result() == 3  # its threads outlive an error
    pool.shutdown()


def test_a_shut_pool_cancels_what_waits_and_takes_no_more() -> None:
    pool, begun, go_on = DaemonPool(1, "t"), threading.Event(), threading.Event()
    running = pool.submit(lambda: (begun.set(), go_on.wait(10)))
    begun.wait(10)
    queued = pool.submit(len, "abc")
    pool.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(CancelledError):
        queued.result(1)
    with pytest.raises(ClosedError):
        pool.submit(len, "abc")
    go_on.set()
    pool.shutdown()
    assert running.result(0)


def test_threads_end_with_the_pool() -> None:
    pool = DaemonPool(4, "forgotten")
    list(pool.map(len, ["a"] * 20))
    del pool
    gc.collect()
    end = time.monotonic() + 10
    while any(thread.name.startswith("forgotten") for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_process_does_not_wait_for_them() -> None:
    code = (
        "import time; from modelpress.store.threads import DaemonPool; p = DaemonPool(1, 't');"
        "p.submit(time.sleep, 100); p.shutdown(wait=False, cancel_futures=True)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=20, check=False).returncode == 0


class Interrupted(Executor):
    """A pool whose `submit` number `fatal` is interrupted after the work was handed in, as Ctrl-C may strike."""

    def __init__(self, fatal: int) -> None:
        self._pool, self._left = DaemonPool(2, "t"), fatal

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = self._pool.submit(fn, *args, **kwargs)
        self._left -= 1
        if not self._left:
            raise KeyboardInterrupt
        return future


@pytest.mark.parametrize("fatal", range(1, 7))
def test_an_interrupt_gives_nothing_back_twice(fatal: int) -> None:
    ended: list[int] = []
    go_on = threading.Event()

    def work(item: int) -> None:
        go_on.wait(10)
        ended.append(item)

    with pytest.raises(KeyboardInterrupt):
        for _ in ahead(Interrupted(fatal), work, iter(range(10)), 8, ended.append):
            pass
    go_on.set()
    end = time.monotonic() + 10
    while len(ended) < fatal:  # the two that ran, and those that were not begun
        assert time.monotonic() < end
        time.sleep(0.005)
    time.sleep(0.05)
    assert sorted(ended) == list(range(fatal))


def test_no_more_is_taken_ahead_than_allowed() -> None:
    taken: list[int] = []

    def items() -> object:
        for number in range(20):
            taken.append(number)
            yield number

    pool = DaemonPool(2, "t")
    for number in ahead(pool, lambda n: n, items(), 4):
        assert len(taken) <= number + 4
    assert taken == list(range(20))
