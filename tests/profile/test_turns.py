"""Runs with and without being watched: how many of each, and in which order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from modelpress.profile import turns
from modelpress.profile.turns import LEAST_RUNS, MOST_ADDED, Turns, take_turns


class Clock:
    """A time that runs as its runs take, so that no machine is too slow for these tests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, plain: float, watched: float) -> None:
        self.now, self.order, self.slept = 0.0, "", 0.0
        self._seconds = {"p": plain, "w": watched}
        monkeypatch.setattr(turns.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(turns.time, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.now, self.slept = self.now + seconds, self.slept + seconds

    def _run(self, kind: str) -> None:
        self.order += kind
        self.now += self._seconds[kind]

    def take(self, seconds: float, most: int = 10**6, settle: float = 0.0) -> Turns:
        return take_turns(
            lambda: self._run("p"),
            lambda: self._run("w"),
            seconds,
            added_seconds=0.001,
            most=most,
            settle_seconds=settle,
        )


@pytest.mark.parametrize(("plain", "watched"), [(0.001, 0.0012), (0.001, 0.003), (0.02, 0.03), (0.0002, 0.0002)])
@pytest.mark.parametrize("settle", [0.0, 0.15])
def test_watching_adds_no_more_than_it_may(
    monkeypatch: pytest.MonkeyPatch, plain: float, watched: float, settle: float
) -> None:
    clock = Clock(monkeypatch, plain, watched)
    found = clock.take(10.0, settle=settle)
    added = (watched - plain) * clock.order.count("w")
    assert added <= (MOST_ADDED + 0.01) * plain * clock.order.count("p")
    assert len(found.watched) >= LEAST_RUNS
    assert found.watched_share <= 0.5 + 0.05
    assert clock.now == pytest.approx(10.0, rel=0.15)


def test_slow_runs_are_watched_often_enough_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 1.0, 3.0)
    found = clock.take(2.0)
    assert len(found.watched) >= LEAST_RUNS


def test_no_more_is_watched_than_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 0.001, 0.001)
    assert clock.take(60.0, most=50).kept.count(True) <= 50
    assert clock.order.count("w") <= 50


def test_each_watched_run_is_accounted_for_and_the_first_of_a_block_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch, 0.01, 0.011)
    found = clock.take(3.0)
    assert len(found.kept) == clock.order.count("w")
    assert found.kept.count(True) == len(found.watched)
    watched = iter(found.kept)
    before = "p"
    for kind in clock.order:
        if kind == "w" and before == "p":
            assert next(watched) is False
        elif kind == "w":
            next(watched)
        before = kind


def test_it_waits_wherever_the_two_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 0.01, 0.011)
    clock.take(3.0, settle=0.15)
    blocks = clock.order.count("pw") + clock.order.count("wp") - 2 * turns._WARM_UP_RUNS
    assert clock.slept == pytest.approx(0.15 * (blocks + 1), abs=0.31)


def test_what_watches_is_open_during_watched_runs_alone() -> None:
    is_open, seen = False, set()

    @contextmanager
    def watching() -> Iterator[None]:
        nonlocal is_open
        is_open = True
        yield
        is_open = False

    take_turns(
        lambda: seen.add(("plain", is_open)),
        lambda: seen.add(("watched", is_open)),
        0.01,
        added_seconds=0.0,
        most=1000,
        watching=watching,
    )
    assert seen == {("plain", False), ("watched", True)}
