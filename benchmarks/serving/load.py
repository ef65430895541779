"""A lean client in a process of its own: prepared bytes on plain sockets, one thread, epoll.

`python -m benchmarks.serving.load` takes a `Job` as JSON on its standard input and gives a `Load` as JSON. It spends
some 15 µs of one core on a request; `canned` measures how many it could send at all, against a server that only sends
the same bytes back, so that a figure near that one is known to be the client's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

TOLERANCE = 1e-3
"""Of a number of an answer, to the one that its pack gives: packs differ by far more."""
ANSWER_SECONDS = 60.0
LOOK_SECONDS = 0.1
"""How often `Job.until` is looked for."""


@dataclass(frozen=True)
class Job:
    """What to send, and for how long."""

    host: str
    port: int
    path: str
    body: str
    """Of each request, in latin-1."""
    clients: int
    """Connections, each of which asks again as soon as it is answered."""
    seconds: float
    requests: int = 0
    """To stop after so many; 0: after `seconds`."""
    headers: dict[str, str] = field(default_factory=dict)
    expected: dict[str, list[float]] | None = None
    """By `model_version`, what its answer must be; None: only its status is looked at."""
    until: str = ""
    """A file: it stops when this is there, at the latest after `seconds`. Empty: none is looked for."""


@dataclass
class Load:
    """What came of it."""

    count: int
    seconds: float
    p50_seconds: float
    p99_seconds: float
    failed: int
    """Answers that were no 200, or did not come."""
    mixed: int
    """Answers that were not what the pack that they name gives."""
    versions: dict[str, int]
    first_failure: str
    timeline: list[tuple[float, float]]
    """Where answers are checked: the moment of each (of CLOCK_MONOTONIC), and its seconds."""

    @property
    def per_second(self) -> float:
        """Answers."""
        return self.count / self.seconds


def run(job: Job) -> Load:
    """Send it from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.serving.load"]
    done = subprocess.run(command, input=json.dumps(asdict(job)), capture_output=True, text=True, check=True)
    return Load(**json.loads(done.stdout))


class _Line:
    """One connection: a request out, an answer back."""

    def __init__(self, job: Job, request: bytes) -> None:
        self.socket = socket.create_connection((job.host, job.port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.settimeout(ANSWER_SECONDS)
        self._request, self._got, self._needed = request, b"", 0
        self.began = 0.0

    def ask(self) -> None:
        self._got, self._needed = b"", 0
        self.began = time.perf_counter()
        self.socket.sendall(self._request)

    def take(self) -> tuple[int, bytes] | None:
        """Status and body once all of it is there."""
        data = self.socket.recv(262144)
        if not data:
            raise ConnectionError("the server closed the connection")
        self._got += data
        if not self._needed:
            end = self._got.find(b"\r\n\r\n")
            if end < 0:
                return None
            head = self._got[:end].lower()
            at = head.find(b"content-length:")
            if at < 0:
                raise ConnectionError("an answer without its length")
            self._needed = end + 4 + int(head[at + 15 :].split(b"\r", 1)[0])
            self._body_at = end + 4
        if len(self._got) < self._needed:
            return None
        return int(self._got[9:12]), self._got[self._body_at : self._needed]


class _End:
    """Whether it is time to stop."""

    def __init__(self, job: Job, started: float) -> None:
        self._requests, self._until = job.requests, job.until
        self._end, self._next_look = started + job.seconds, started

    def reached(self, now: float) -> bool:
        if self._requests:
            return False
        if self._until and now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            if os.path.exists(self._until):
                self._end = now
        return now >= self._end


class _Tally:
    def __init__(self, job: Job) -> None:
        self.job, self.times, self.failed, self.mixed = job, list[float](), 0, 0
        self.versions, self.first_failure = Counter[str](), ""
        self.timeline: list[tuple[float, float]] = []

    def fail(self, why: str) -> None:
        self.failed += 1
        self.first_failure = self.first_failure or why[:300]

    def answered(self, status: int, body: bytes, seconds: float) -> None:
        if status != 200:
            self.fail(f"{status} {body[:200]!r}")
            return
        self.times.append(seconds)
        if self.job.expected is None:
            return
        self.timeline.append((time.monotonic(), seconds))
        answer = json.loads(body)
        version, data = answer["model_version"], answer["outputs"][0]["data"]
        self.versions[version] += 1
        wanted = self.job.expected.get(version)
        close = wanted is not None and len(wanted) == len(data)
        if not close or any(abs(a - b) > TOLERANCE for a, b in zip(data, wanted or (), strict=True)):
            self.mixed += 1


def work(job: Job) -> Load:
    """Send it from this process."""
    body = job.body.encode("latin-1")
    head = f"POST {job.path} HTTP/1.1\r\nHost: {job.host}\r\nContent-Length: {len(body)}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in job.headers.items())
    request, tally = head.encode() + b"\r\n" + body, _Tally(job)
    selector, started = selectors.DefaultSelector(), time.perf_counter()
    left = job.requests or sys.maxsize
    for _ in range(min(job.clients, left)):
        line = _Line(job, request)
        selector.register(line.socket, selectors.EVENT_READ, line)
        line.ask()
        left -= 1
    end = _End(job, started)
    while selector.get_map():
        ready = selector.select(ANSWER_SECONDS)
        if not ready:
            for key in list(selector.get_map().values()):
                selector.unregister(key.fileobj)
                tally.fail(f"no answer in {ANSWER_SECONDS:.0f} s")
        for key, _ in ready:
            line = key.data
            try:
                found = line.take()
            except OSError as error:
                tally.fail(repr(error))
                selector.unregister(line.socket)
                line.socket.close()
                continue
            if found is None:
                continue
            now, (status, answer) = time.perf_counter(), found
            tally.answered(status, answer, now - line.began)
            if left > 0 and not end.reached(now):
                left -= 1
                line.ask()
            else:
                selector.unregister(line.socket)
                line.socket.close()
    times = np.array(tally.times or [np.nan])
    return Load(
        count=len(tally.times),
        seconds=time.perf_counter() - started,
        p50_seconds=float(np.quantile(times, 0.5)),
        p99_seconds=float(np.quantile(times, 0.99)),
        failed=tally.failed,
        mixed=tally.mixed,
        versions=dict(tally.versions),
        first_failure=tally.first_failure,
        timeline=tally.timeline,
    )


@contextlib.contextmanager
def canned(answer: bytes) -> Iterator[tuple[str, int]]:
    """A server in this process that sends `answer` for each 64 KiB or less that comes in, and looks at nothing."""

    class Back(asyncio.Protocol):
        transport: Any

        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:  # noqa: ARG002
            self.transport.write(whole)

    whole = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(answer), answer)
    loop, ready, at = asyncio.new_event_loop(), threading.Event(), list[tuple[str, int]]()

    async def serve() -> None:
        server = await loop.create_server(Back, "127.0.0.1", 0)
        at.append(server.sockets[0].getsockname()[:2])
        ready.set()

    def live() -> None:
        loop.run_until_complete(serve())
        loop.run_forever()

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    ready.wait()
    try:
        yield at[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(work(Job(**json.load(sys.stdin))))))
