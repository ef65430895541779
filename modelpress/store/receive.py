"""Ranges of one object, straight into memory that is given: received in parallel, handed on in order, copied nowhere.

Fresh memory costs more than what happens in it: of the 1.4 seconds of CPU in which 1 GiB came as new `bytes`, 0.9 were
page faults. So the caller brings the memory, and uses it again.
"""

from __future__ import annotations

import contextlib
import http.client
import mmap
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future

BLOCK_BYTES = 2**20
"""What is received between two looks at whether to go on."""
HUGE_BYTES = 2**21
LOOK_SECONDS = 0.2
"""After so long without a byte, whoever waits is asked whether to go on."""


class StoppedError(RuntimeError):
    """Nobody wants these bytes any more."""


class Target:
    """Where the bytes of one answer go: a place in memory, filled once, however often the request is repeated.

    What was said to have come is never written again: a repeat brings these bytes anew, and they are passed over. So a
    reader may hash and decode them while later ones are on their way.
    """

    def __init__(self, view: memoryview, moved: Callable[[], None] = lambda: None) -> None:
        self.view, self.received = view, 0
        self._moved, self._stopped = moved, False
        self._line: socket.socket | None = None
        self._lock = threading.Lock()

    def take(self, response: http.client.HTTPResponse, line: socket.socket | None = None) -> None:
        """Receive the body of an answer.

        Raises:
            HTTPException: it has no length, more bytes than were asked for, or ends early.
            StoppedError: it was stopped.
        """
        length = response.length
        if length is None or length > len(self.view):
            raise http.client.HTTPException(f"an answer of {length} bytes to a request for {len(self.view)}")
        self._line = line
        try:
            again = min(self.received, length)
            spare = memoryview(bytearray(min(again, BLOCK_BYTES)))
            position = 0
            while position < length:
                end = min(position + BLOCK_BYTES, length) if position >= again else min(position + len(spare), again)
                with self._lock:
                    if self._stopped:
                        raise StoppedError
                    into = self.view[position:end] if position >= again else spare[: end - position]
                    count = response.readinto(into)
                if not count:
                    raise http.client.IncompleteRead(b"", length - position)
                position += count
                if position > self.received:
                    self.received = position
                    self._moved()
        finally:
            self._line = None

    def fill(self, data: bytes) -> None:
        """Take the bytes from the begin of the range, which came another way.

        Raises:
            StoppedError: it was stopped.
        """
        with self._lock:
            if self._stopped:
                raise StoppedError
            self.view[self.received : len(data)] = data[self.received :]
            self.received = max(self.received, len(data))
        self._moved()

    def check(self) -> None:
        """Refuse another attempt for what nobody wants.

        Raises:
            StoppedError: it was stopped.
        """
        if self._stopped:
            raise StoppedError

    def stop(self) -> None:
        """Receive no more; after this returns, nothing is written to the memory. It waits for no server."""
        self._stopped = True
        line = self._line
        if line is not None:
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for bytes
        with self._lock:
            pass


def receive(
    pool: Executor,
    fetch: Callable[[int, Target], None],
    places: Iterator[tuple[int, memoryview]],
    most: int,
    arrived: Callable[[memoryview], None],
) -> None:
    """Fetch ranges in a pool, at most `most` at a time, and hand on what came, in order, while it comes.

    Args:
        pool: whose threads receive.
        fetch: receives the range that begins at this offset of the object into the target.
        places: offset and memory of each range, in order. The memory of a range may be used again by the range `most`
            places later: by then `arrived` has seen it.
        most: ranges at a time.
        arrived: called in this thread with each new run of bytes, and with none while nothing comes.

    After it returns or raises, nothing is written to the memory. Raises what `fetch` or `arrived` raised first.
    """
    changed = threading.Condition()

    def moved(_: object = None) -> None:
        with changed:
            changed.notify()

    waiting: deque[tuple[Future[None], Target]] = deque()
    handed = 0
    try:
        while True:
            while len(waiting) < most and (place := next(places, None)) is not None:
                target = Target(place[1], moved)
                waiting.append((pool.submit(fetch, place[0], target), target))
                waiting[-1][0].add_done_callback(moved)
            if not waiting:
                return
            first, target = waiting[0]
            with changed:
                changed.wait_for(lambda: first.done() or target.received > handed or _failed(waiting), LOOK_SECONDS)  # noqa: B023
            # In this order: all of a range has come when its future is done, unless it failed.
            done, count = first.done(), target.received
            for future, _ in waiting:
                if future.done():
                    future.result()
            arrived(target.view[handed:count])
            handed = count
            if done:
                waiting.popleft()
                handed = 0
    finally:
        for future, target in waiting:
            future.cancel()
            target.stop()


def _failed(waiting: deque[tuple[Future[None], Target]]) -> bool:
    return any(future.done() and future.exception() is not None for future, _ in waiting)


def memory(size: int) -> memoryview:
    """Writable memory of `size` bytes, in huge pages where there are any: a fault for 2 MiB and not for each 4 KiB."""
    if size < HUGE_BYTES:
        return memoryview(bytearray(size))
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has none
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            block.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(block)
