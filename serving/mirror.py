"""Answered requests run again on a candidate: in a thread of low priority, and dropped where it can't keep up."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from modelpress.errors import ServingError
from serving.engine import Engine

log = logging.getLogger("modelpress.serving")

MAX_WAITING = 64
"""Requests."""
MAX_WAITING_BYTES = 64 * 2**20
"""Of their inputs and answers: what waits must not cost much memory."""
NICENESS = 10
"""Of the thread, where the system has one per thread (Linux): it yields to those that answer."""

Arrays = Mapping[str, np.ndarray]
Flags = npt.NDArray[np.bool_]
Compare = Literal["argmax", "values"]


@dataclass(frozen=True)
class Mirrored:
    """One answered request."""

    engine: Engine
    """The candidate's."""
    inputs: Arrays
    answers: Arrays
    """The champion's: those that were asked for."""
    compare: Compare
    tolerance: float
    done: Callable[[float], None]
    """Told the share of samples on which the two disagree."""

    @property
    def size_bytes(self) -> int:
        """Of what it keeps in memory."""
        return sum(array.nbytes for array in (*self.inputs.values(), *self.answers.values()))


class Mirror:
    """The queue, and the thread that works it off. Safe to call from threads."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[Mirrored | None] = queue.Queue(MAX_WAITING)
        self._bytes, self._lock = 0, threading.Lock()
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """Let go of what waits; what runs is not waited for."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._waiting.get_nowait()
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)

    def offer(self, mirrored: Mirrored) -> bool:
        """Take a request in, at once; False: there is no room, and it is dropped."""
        size = mirrored.size_bytes
        with self._lock:
            if self._bytes + size > MAX_WAITING_BYTES:
                return False
            try:
                self._waiting.put_nowait(mirrored)
            except queue.Full:
                return False
            self._bytes += size
        return True

    def _work(self) -> None:
        if hasattr(os, "setpriority"):
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while (one := self._waiting.get()) is not None:
            try:
                one.done(self._disagreement(one))
            finally:
                with self._lock:
                    self._bytes -= one.size_bytes

    def _disagreement(self, one: Mirrored) -> float:
        try:
            found = one.engine.infer(one.inputs, list(one.answers))
        except (ServingError, MemoryError) as error:  # the champion could answer it
            log.warning("pack %s failed on a mirrored request: %s", one.engine.pack[:12], error)
            return 1.0
        return disagreement(one.answers, found, one.compare, one.tolerance)


def disagreement(answers: Arrays, others: Arrays, compare: Compare, tolerance: float) -> float:
    """The share of samples on which two models disagree in any output, from 0 to 1.

    Args:
        answers: the champion's, (samples, …) each; where their first axes differ, all is one sample.
        others: the candidate's, for the same inputs.
        compare: `argmax`: another largest number along the last axis, where that has two or more; `values`: numbers
            that differ by more than `tolerance` times the largest of the champion's in the sample. Integers, booleans
            and texts must be equal; numbers that are not finite agree with nothing.
        tolerance: see `compare`.
    """
    pairs = [(array, others.get(name)) for name, array in answers.items()]
    if any(other is None or other.shape != array.shape or other.dtype != array.dtype for array, other in pairs):
        return 1.0
    lengths = {array.shape[0] if array.ndim else None for array, _ in pairs}
    samples = next(iter(lengths)) if len(lengths) == 1 else None
    if not samples:
        samples = 1
        pairs = [(array[None], other[None]) for array, other in pairs if other is not None]
    differs = np.zeros(samples, np.bool_)
    for array, other in pairs:
        assert other is not None
        differs |= _differs(array, other, compare, tolerance)
    return float(differs.mean())


def _differs(array: np.ndarray, other: np.ndarray, compare: Compare, tolerance: float) -> Flags:
    """(samples,)."""
    rows = array.shape[0]
    if array.dtype.kind != "f":
        return _any(np.not_equal(array, other), rows)
    bad = _any(~np.isfinite(array) | ~np.isfinite(other), rows)
    if compare == "argmax" and array.ndim > 1 and array.shape[-1] > 1:
        return np.logical_or(bad, _any(np.not_equal(array.argmax(axis=-1), other.argmax(axis=-1)), rows))
    wide, narrow = array.astype(np.float64).reshape(rows, -1), other.astype(np.float64).reshape(rows, -1)
    scale = np.abs(wide).max(axis=1, initial=0.0)
    with np.errstate(invalid="ignore"):  # infinities differ anyway
        far = np.abs(wide - narrow).max(axis=1, initial=0.0) > tolerance * scale
    either: Flags = np.logical_or(bad, far)
    return either


def _any(differing: Flags, rows: int) -> Flags:
    found: Flags = np.any(np.reshape(differing, (rows, -1)), axis=1)
    return found


def finite(answers: Arrays, outputs: Sequence[str]) -> bool:
    """Whether every number of the outputs that were asked for is one."""
    return all(answers[name].dtype.kind != "f" or bool(np.isfinite(answers[name]).all()) for name in outputs)
