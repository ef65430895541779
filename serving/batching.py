"""Micro-batching: requests that wait for a thread are joined along their first axis, run together, and cut apart.

Nothing waits for company where a thread is free, unless `delay_seconds` says so: rows gather while the threads are
busy, and so batches grow with the load and shrink with it. Two bounds hold the latency down: rows are joined only
while their run is expected to take at most `run_seconds`, by what rows of this model last took, and never more than
`rows`. Only models whose rows keep their answers are joined (`serving.rows`).

Everything here but `_Job.run` belongs to one event loop, and so needs no locks.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from serving.refusals import DeadlineError, RequestError
from serving.rows import Rows

AHEAD_SECONDS = 1e-3
"""Models whose rows take longer are handed on ahead of time, one run per thread: at its end a thread has the next at
once, while the event loop may have to wait for a core. Faster ones gather rows instead (encoder, two cores, 8 clients:
289 to 377 answers a second; digits, 64 clients: 7,500 to 5,900)."""
RISING, FALLING = 0.05, 0.5
"""Weights of the newest measurement in what a row is expected to take. A run that was slow once, because something else
had the core, must not keep rows apart for long; one that was fast shows what the model can do."""

Arrays = dict[str, np.ndarray]
Ran = Future["list[Arrays | RequestError]"]


class Runs(Protocol):
    """What requests are run on: an `Engine`."""

    rows: Rows
    row_seconds: float

    def infer(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> Arrays:
        """Run on checked inputs; the outputs by name."""


@dataclass(frozen=True)
class Bounds:
    """How far requests are joined."""

    rows: int = 64
    """Most rows of a batch; 1 joins nothing."""
    run_seconds: float = 0.04
    """Rows are joined while the run is expected to take at most this."""
    delay_seconds: float = 0.0
    """How long a request may wait for company though a thread is free."""


@dataclass(eq=False)
class _Ask:
    inputs: Arrays
    rows: int
    answer: asyncio.Future[Arrays]


@dataclass(eq=False)
class _Job:
    """Requests that run together, of one engine, for the same outputs and with the same inner shapes."""

    engine: Runs
    outputs: tuple[str, ...]
    key: tuple[Any, ...] | None
    """What others must share to join; None: nobody may."""
    due: float
    """Time of the loop from which on it does not wait for company."""
    asks: list[_Ask] = field(default_factory=list)
    rows: int = 0
    begun: bool = False
    """Whether a thread has it."""
    seconds: float = 0.0
    """How long it ran; 0: it did not."""

    def run(self) -> list[Arrays | RequestError]:
        """One result per request; in a thread."""
        self.begun = True
        if all(ask.answer.done() for ask in self.asks):  # too late, or gone, before a thread was there
            return [_too_late()] * len(self.asks)
        started = time.perf_counter()
        try:
            if len(self.asks) == 1:
                return [self._alone(self.asks[0])]
            try:
                return self._together()
            except RequestError:  # one of them holds what the model can't run on: the others must not suffer for it
                return [self._alone(ask) for ask in self.asks]
        finally:
            self.seconds = time.perf_counter() - started

    def _alone(self, ask: _Ask) -> Arrays | RequestError:
        try:
            return self.engine.infer(ask.inputs, self.outputs)
        except RequestError as error:
            return error

    def _together(self) -> list[Arrays | RequestError]:
        parts = [ask.inputs for ask in self.asks]
        found = self.engine.infer(
            {name: np.concatenate([one[name] for one in parts]) for name in parts[0]}, self.outputs
        )
        answers: list[Arrays | RequestError] = []
        start = 0
        for ask in self.asks:
            answers.append({name: array[start : start + ask.rows] for name, array in found.items()})
            start += ask.rows
        return answers


class Batcher:
    """Hands requests to threads, joined where they may be."""

    def __init__(self, workers: int, bounds: Bounds | None = None) -> None:
        """
        Args:
            workers: threads, and so runs at a time.
            bounds: how far requests are joined; None takes the defaults.
        """
        self._bounds = bounds or Bounds()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="infer")
        self._workers = workers
        self._handed: set[_Job] = set()
        """What the threads were given and have not done."""
        self._jobs: deque[_Job] = deque()
        self._open: dict[tuple[Any, ...], _Job] = {}
        self._woken = False
        self._alarm: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """Requests that wait for a thread."""
        ahead = (job for job in self._handed if not job.begun)
        return sum(len(job.asks) for jobs in (self._jobs, ahead) for job in jobs)

    async def run(self, engine: Runs, inputs: Arrays, outputs: Sequence[str], deadline: float | None = None) -> Arrays:
        """Outputs by name, alone or in company. A cancelled task takes its request out of the queue.

        Args:
            engine: what to run.
            inputs: checked arrays by name.
            outputs: names of those wanted.
            deadline: time of the loop after which the answer is of no use.

        Raises:
            DeadlineError: it passed. What waits is not run then; what runs is finished, and thrown away.
            RequestError: see `Engine.infer`.
        """
        loop = asyncio.get_running_loop()
        if deadline is not None and deadline <= loop.time():
            raise _too_late()
        rows = len(next(iter(inputs.values()))) if _has_rows(inputs) else 1
        ask = _Ask(inputs, rows, loop.create_future())
        self._add(engine, tuple(outputs), ask, loop.time())
        # What arrives in the same turn of the loop is joined before any of it is handed on.
        self._wake(loop)
        expiry = None if deadline is None else loop.call_at(deadline, _expire, ask.answer)
        try:
            return await ask.answer
        finally:
            if expiry is not None:
                expiry.cancel()

    def close(self) -> None:
        """Wait for what runs; what waits is not run."""
        for job in self._jobs:
            for ask in job.asks:
                ask.answer.cancel()
        self._threads.shutdown(cancel_futures=True)

    def _add(self, engine: Runs, outputs: tuple[str, ...], ask: _Ask, now: float) -> None:
        key = _key(engine, outputs, ask.inputs) if engine.rows.joined and self._bounds.rows > 1 else None
        if key is not None and (job := self._open.get(key)) is not None:
            rows = job.rows + ask.rows
            if rows <= self._bounds.rows and rows * engine.row_seconds <= self._bounds.run_seconds:
                job.asks.append(ask)
                job.rows = rows
                if rows == self._bounds.rows:
                    job.due = now
                return
            job.due = now  # full: it waits no longer
        due = now + (self._bounds.delay_seconds if key is not None else 0.0)
        job = _Job(engine, outputs, key, due, [ask], ask.rows)
        self._jobs.append(job)
        if key is not None:
            self._open[key] = job

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._woken:
            self._woken = True
            loop.call_soon(self._hand_on, loop)

    def _hand_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """Give jobs that need not wait to threads that are free, the oldest first."""
        self._woken = False
        held: list[_Job] = []
        while self._jobs and self._takes(self._jobs[0]):
            job = self._jobs.popleft()
            if job.due > loop.time():
                held.append(job)
                continue
            if job.key is not None and self._open.get(job.key) is job:
                del self._open[job.key]
            job.asks = [ask for ask in job.asks if not ask.answer.done()]
            if job.asks:
                job.rows = sum(ask.rows for ask in job.asks)
                self._handed.add(job)
                running = self._threads.submit(job.run)
                running.add_done_callback(partial(_tell, loop, self._done, job))
        self._jobs.extendleft(reversed(held))
        if held and self._alarm is None:
            self._alarm = loop.call_at(min(job.due for job in held), self._ring, loop)

    def _takes(self, job: _Job) -> bool:
        """Whether the threads take another run, one that may have to wait for its thread."""
        most = self._workers * (1 if job.engine.row_seconds < AHEAD_SECONDS else 2)
        return len(self._handed) < most

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        self._alarm = None
        self._wake(loop)

    def _done(self, loop: asyncio.AbstractEventLoop, job: _Job, done: Ran) -> None:
        self._handed.discard(job)
        if job.seconds:
            engine, seconds = job.engine, job.seconds / job.rows
            weight = RISING if seconds > engine.row_seconds else FALLING
            engine.row_seconds += weight * (seconds - engine.row_seconds)
        if done.cancelled():  # the server ends
            for ask in job.asks:
                ask.answer.cancel()
            return
        error = done.exception()
        results: Sequence[Arrays | BaseException] = [error] * len(job.asks) if error is not None else done.result()
        for ask, result in zip(job.asks, results, strict=True):
            if ask.answer.done():
                continue
            if isinstance(result, BaseException):
                ask.answer.set_exception(result)
            else:
                ask.answer.set_result(result)
        if self._jobs:
            self._wake(loop)


def _tell(
    loop: asyncio.AbstractEventLoop,
    done: Callable[[asyncio.AbstractEventLoop, _Job, Ran], None],
    job: _Job,
    ran: Ran,
) -> None:
    loop.call_soon_threadsafe(done, loop, job, ran)


def _key(engine: Runs, outputs: tuple[str, ...], inputs: Arrays) -> tuple[Any, ...] | None:
    """Of what may be joined; None where the inputs have not one number of rows."""
    if not _has_rows(inputs):
        return None
    return (id(engine), outputs, *((name, array.shape[1:]) for name, array in sorted(inputs.items())))


def _has_rows(inputs: Arrays) -> bool:
    sizes = {array.shape[:1] for array in inputs.values()}
    return len(sizes) == 1 and () not in sizes


def _expire(answer: asyncio.Future[Arrays]) -> None:
    if not answer.done():
        answer.set_exception(_too_late())


def _too_late() -> DeadlineError:
    return DeadlineError("inference", found="its deadline passed", expected="more time, or less load")
