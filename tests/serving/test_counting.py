"""Counters of a canary: what is slow, and that no count is lost."""

from __future__ import annotations

import threading

import pytest

from serving import counting
from serving.counting import Counter
from tests.canary.states import config
from tests.serving.canaries import HALF, SHADOW


def test_slow_is_what_the_champion_s_own_answers_say() -> None:
    counter = Counter(config(HALF))
    for number in range(counting.CALIBRATION):
        assert counter.slow_seconds is None
        counter.answered(0, candidate=True, seconds=9.0)  # of another model: it says nothing of what is slow
        counter.answered(0, candidate=False, seconds=number / 1000)
    assert counter.slow_seconds == pytest.approx(0.19, abs=0.001)
    (step,) = counter.tallies()
    assert step.candidate.timed == step.champion.timed == 0
    counter.answered(0, candidate=True, seconds=0.2)
    counter.answered(0, candidate=False, seconds=0.1)
    (step,) = counter.tallies()
    assert (step.candidate.slow, step.candidate.timed, step.champion.slow, step.champion.timed) == (1, 1, 0, 1)


def test_counts_from_many_threads_are_all_there() -> None:
    counter = Counter(config(SHADOW, HALF))

    def count() -> None:
        for _ in range(500):
            counter.answered(1, candidate=True, seconds=0.1)
            counter.mirrored(0, 0.0)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.ran for one in counter.tallies()] == [2000, 2000]
