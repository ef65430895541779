"""Worker processes and their cores: a slice is handed to one that is free; one that dies takes only its slice along.

Each worker is a process of its own, with pipes of its own: where a pool of `concurrent.futures` loses one process, it
ends the others and gives up all that was handed to it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO

from modelpress.cores import cores
from modelpress.errors import WorkerError
from modelpress.workers.protocol import Asked, Reply

START_SECONDS = 600.0
"""How long a worker may take to import what it needs."""
STOP_SECONDS = 5.0
_TAIL_BYTES = 2000


@dataclass(frozen=True)
class Kind:
    """What a pool's processes are."""

    module: str = "modelpress.workers.process"
    """What they run; it calls `modelpress.workers.process.serve`."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that they have beside this process's own."""
    too_slow: str = "raise workers.slice_seconds, or cut smaller slices with workers.slices"
    """The way out where one takes longer than it may."""


SLICES = Kind()
"""Processes that do slices of stages."""


class Worker:
    """One process. Only one thread at a time may ask it.

    Args:
        on: the cores that it runs on; as many threads it has.
        kind: what it runs.
    """

    def __init__(self, on: list[int], kind: Kind = SLICES) -> None:
        self._kind = kind
        self._errors: IO[bytes] = tempfile.TemporaryFile(prefix="modelpress-worker-")  # noqa: SIM115  closed by `stop`
        # What it imports is what this process would: paths that a test or a notebook added, too.
        environment = os.environ | {
            "OMP_NUM_THREADS": str(len(on)),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            **kind.environment,
        }
        command = [sys.executable, "-m", kind.module, ",".join(map(str, on))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=environment
        )
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name=f"worker-{self.pid}", daemon=True).start()
        self._started = False

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def ask(self, job: Asked, seconds: float | None = None) -> Reply:
        """Do a slice, in so many seconds from when the process is there.

        Raises:
            WorkerError: the process died, or took longer. It is of no more use then.
        """
        doing = f"running slice {job.slice} ({job.kind}), attempt {job.attempt}, in worker {self.pid}"
        if not self._started:
            self._line(doing, START_SECONDS)
            self._started = True
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(job.model_dump_json().encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._lost(doing) from error
        return Reply.model_validate_json(self._line(doing, seconds))

    def stop(self) -> None:
        """End the process, whatever it does."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # which is what it ends at
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        self._errors.close()

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _line(self, doing: str, seconds: float | None) -> bytes:
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise WorkerError(
                doing,
                found=f"no result after {seconds:g} s",
                expected="one by then",
                fix=self._kind.too_slow,
            ) from None
        if line is None:
            raise self._lost(doing)
        return line

    def _lost(self, doing: str) -> WorkerError:
        code = self._process.wait()
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - _TAIL_BYTES))
        said = self._errors.read().decode(errors="replace").strip()
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        return WorkerError(
            doing,
            found=f"it ended with {how}" + (f", having said: {said}" if said else ""),
            expected="a result",
            fix="look whether memory ran out (signal 9): fewer workers, or smaller batches, need less",
        )


@dataclass
class _Seat:
    """A worker's place, with cores of its own."""

    cores: list[int]
    worker: Worker | None = None


class Pool:
    """So many workers, started when they are first needed; safe to be asked from as many threads.

    Args:
        count: worker processes.
        threads: cores of each; 0: those that this process may use, divided by `count`.
        kind: what they run.
    """

    def __init__(self, count: int, threads: int = 0, kind: Kind = SLICES) -> None:
        usable, self._kind, self._closed = cores(), kind, False
        self.count, self.threads = count, threads or max(1, len(usable) // count)
        self._seats = [
            _Seat(sorted({usable[(number * self.threads + one) % len(usable)] for one in range(self.threads)}))
            for number in range(count)
        ]
        self._free: queue.LifoQueue[_Seat] = queue.LifoQueue()
        for seat in reversed(self._seats):
            self._free.put(seat)

    def run(self, job: Asked, seconds: float | None = None, began: Callable[[int], object] = lambda _: None) -> Reply:
        """Do a slice in the next worker that is free; see `Worker.ask`. `began` is told the worker's process id.

        Raises:
            WorkerError: the worker died, or took longer than `seconds`; the next slice has another.
        """
        seat = self._free.get()
        try:
            if self._closed:
                raise WorkerError(f"running slice {job.slice} ({job.kind})", found="workers that were told to end")
            if seat.worker is None or not seat.worker.is_alive:
                seat.worker = Worker(seat.cores, self._kind)
            began(seat.worker.pid)
            return seat.worker.ask(job, seconds)
        except BaseException:  # also an interrupt: what the worker says next would be taken for another slice's result
            if seat.worker is not None:
                seat.worker.kill()
                seat.worker.stop()
                seat.worker = None
            raise
        finally:
            self._free.put(seat)

    def close(self) -> None:
        """End all workers; who asks one after that gets an error."""
        self._closed = True
        for seat in self._seats:
            if seat.worker is not None:
                seat.worker.stop()
                seat.worker = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
