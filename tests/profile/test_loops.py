"""Closed and open loops: arrivals, waiting, and the queue on paper."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpress.profile import loops
from modelpress.reports import Measured, NotMeasured


def answered(due: list[float], service: list[float]) -> loops.Served:
    """What one worker does with these arrivals, by Lindley's recursion."""
    begun, ended, free = [], [], 0.0
    for arrived, taken in zip(due, service, strict=True):
        begun.append(max(arrived, free))
        free = begun[-1] + taken
        ended.append(free)
    return loops.Served(np.array(due), np.array(begun), np.array(ended))


REQUESTS = st.lists(st.tuples(st.floats(0, 3), st.floats(0.001, 2)), min_size=1, max_size=30)


@given(REQUESTS)
@settings(max_examples=60, deadline=None)
def test_waiting_counts_from_the_intended_arrival(requests: list[tuple[float, float]]) -> None:
    due = list(np.cumsum([gap for gap, _ in requests]))
    service = [taken for _, taken in requests]
    served = answered(due, service)
    found = loops.load_profile(served, rate=2.0, service_seconds=0.25)
    assert found.utilisation == 0.5
    assert found.requests == len(requests)
    assert found.mean_seconds >= found.service_mean_seconds - 1e-9
    assert found.max_seconds == pytest.approx(max(served.ended - served.due))
    assert found.percentiles_seconds[0] <= found.p50_seconds <= found.p90_seconds <= found.p99_seconds
    waiting = [
        sum(served.due[other] <= served.begun[number] for other in range(number + 1, len(due)))
        for number in range(len(due))
    ]
    assert found.longest_queue == max(waiting)


def test_a_slow_call_delays_those_behind_it() -> None:
    """A closed loop would report three calls of the same length: that is coordinated omission."""
    served = loops.open_loop(lambda: time.sleep(0.01), np.zeros(3))
    latency = served.ended - served.due
    assert (latency >= [0.01, 0.02, 0.03]).all()
    assert (served.begun[1:] >= served.ended[:-1]).all()


def test_nothing_is_answered_before_it_has_arrived() -> None:
    served = loops.open_loop(lambda: None, np.array([0.0, 0.004, 0.004, 0.01]))
    assert (served.begun >= served.due).all()


def test_the_mean_of_the_queue_on_paper_is_that_of_a_long_simulation() -> None:
    generator = np.random.default_rng(1)
    service = generator.exponential(1.0, 200_000)
    due = np.cumsum(generator.exponential(1 / 0.5, service.size))
    simulated = loops.load_profile(answered(list(due), list(service)), 0.5, 1.0)
    assert isinstance(simulated.modelled_mean_seconds, Measured)
    assert simulated.modelled_mean_seconds.value == pytest.approx(simulated.mean_seconds, rel=0.05)
    exact = 1 / (1 - 0.5)  # an M/M/1 queue's mean latency: 1 ÷ (service rate − arrival rate)
    assert simulated.modelled_mean_seconds.value == pytest.approx(exact, rel=0.03)


@given(st.floats(1.0, 4.0))
def test_a_queue_that_grows_without_end_has_no_mean(utilisation: float) -> None:
    assert isinstance(loops.pollaczek_khinchine(utilisation, [1.0, 1.0]), NotMeasured)


@given(st.floats(0.5, 500), st.floats(0.01, 20), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_arrivals_ascend_and_are_the_same_for_a_seed(rate: float, seconds: float, seed: int) -> None:
    found = loops.arrivals(rate, seconds, seed)
    assert found.size >= loops.LEAST_REQUESTS
    assert (np.diff(found) >= 0).all()
    assert found[0] > 0
    assert (found == loops.arrivals(rate, seconds, seed)).all()


def test_gaps_between_arrivals_are_exponential() -> None:
    gaps = np.diff(loops.arrivals(100.0, 100.0, 0))
    assert gaps.mean() == pytest.approx(0.01, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # which no even spacing has


def test_a_closed_loop_reports_what_it_did() -> None:
    calls = []
    found = loops.closed_loop(lambda: calls.append(1), 4, 0.01)
    assert len(calls) > found.calls >= loops.LEAST_CALLS
    assert found.percentiles_seconds == sorted(found.percentiles_seconds)
    assert found.throughput_per_second == pytest.approx(4 / found.mean_seconds)
