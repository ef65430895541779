"""Latency in a closed and in an open loop.

In an open loop requests arrive by a Poisson process, whether or not the one before has been answered, and each one's
latency counts from the time that it was meant to arrive: a slow call delays those behind it, and their waiting is in
the figures (no coordinated omission; Schroeder, Wierman, Harchol-Balter, "Open Versus Closed", NSDI 2006). One worker
answers in order, a request at a time, so that the M/G/1 queue is the model beside which the measurement stands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelpress.reports.measured import Figure, Measured, NotMeasured
from modelpress.reports.profile import LatencyProfile, LoadProfile

LEAST_CALLS = 10
LEAST_REQUESTS = 20
SPIN_SECONDS = 0.0005
"""A sleep may take this much too long: the rest of a wait is spent awake."""
_WARM_UP_CALLS = 3
_PERCENTILES = np.arange(101)

Seconds = NDArray[np.float64]


def closed_loop(call: Callable[[], object], batch_size: int, seconds: float) -> LatencyProfile:
    """Time calls one after the other for about `seconds`, after a warm-up."""
    for _ in range(_WARM_UP_CALLS):
        call()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < LEAST_CALLS or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    found = np.asarray(times)
    percentiles = np.percentile(found, _PERCENTILES)
    return LatencyProfile(
        batch_size=batch_size,
        calls=found.size,
        p50_seconds=float(percentiles[50]),
        p99_seconds=float(percentiles[99]),
        throughput_per_second=float(batch_size * found.size / found.sum()),
        mean_seconds=float(found.mean()),
        percentiles_seconds=[float(value) for value in percentiles],
    )


def arrivals(rate: float, seconds: float, seed: int) -> Seconds:
    """Times of Poisson arrivals at `rate` per second within `seconds` from 0, ascending; at least `LEAST_REQUESTS`."""
    generator = np.random.default_rng(seed)
    count = max(LEAST_REQUESTS, generator.poisson(rate * seconds))
    gaps = generator.exponential(1 / rate, count)
    return np.asarray(np.cumsum(gaps), dtype=np.float64)


@dataclass(frozen=True)
class Served:
    """When each request was meant to arrive, and when its call began and ended; seconds from the first moment on."""

    due: Seconds
    begun: Seconds
    ended: Seconds


def open_loop(call: Callable[[], object], due: Seconds) -> Served:
    """Answer requests in the order in which they arrive, one at a time, none before it has arrived."""
    begun, ended = np.empty(due.size), np.empty(due.size)
    start = time.perf_counter()
    for number, moment in enumerate(due):
        while (left := moment - (time.perf_counter() - start)) > 0:
            if left > SPIN_SECONDS:
                time.sleep(left - SPIN_SECONDS)
        begun[number] = time.perf_counter() - start
        call()
        ended[number] = time.perf_counter() - start
    return Served(due, begun, ended)


def load_profile(served: Served, rate: float, service_seconds: float) -> LoadProfile:
    """Figures of an open loop.

    Args:
        served: at least one request.
        rate: that the arrivals were drawn with, per second.
        service_seconds: mean time of a call in a closed loop, by which the utilisation counts.
    """
    latency, service = served.ended - served.due, served.ended - served.begun
    percentiles = np.percentile(latency, _PERCENTILES)
    return LoadProfile(
        rate_per_second=rate,
        utilisation=rate * service_seconds,
        requests=latency.size,
        answered_per_second=float(latency.size / served.ended[-1]),
        mean_seconds=float(latency.mean()),
        p50_seconds=float(percentiles[50]),
        p90_seconds=float(percentiles[90]),
        p99_seconds=float(percentiles[99]),
        max_seconds=float(percentiles[100]),
        service_mean_seconds=float(service.mean()),
        longest_queue=longest_queue(served),
        modelled_mean_seconds=pollaczek_khinchine(rate, service),
        percentiles_seconds=[float(value) for value in percentiles],
    )


def longest_queue(served: Served) -> int:
    """Most requests that had arrived and waited while another was being answered."""
    arrived = np.searchsorted(served.due, served.begun, side="right")
    return int((arrived - np.arange(1, served.due.size + 1)).max(initial=0))


def pollaczek_khinchine(rate: float, service: Sequence[float] | Seconds) -> Figure:
    """Mean latency of an M/G/1 queue: E[S] + rate · E[S²] ÷ (2 · (1 − rate · E[S])), seconds."""
    times = np.asarray(service, dtype=np.float64)
    utilisation = rate * float(times.mean())
    if utilisation >= 1:
        return NotMeasured(not_measured=f"at a utilisation of {utilisation:.2f} the queue grows without end")
    waiting = rate * float((times**2).mean()) / (2 * (1 - utilisation))
    return Measured(value=float(times.mean()) + waiting, by="Pollaczek–Khinchine")
