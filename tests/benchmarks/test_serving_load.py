"""The client of the serving benchmarks: it counts what came, and finds an answer that is not its pack's."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path

import pytest

from benchmarks.serving.load import Job, Load, canned, work
from benchmarks.serving.malformed import FAULTS
from benchmarks.serving.models import Model, digits

PACK = "a" * 64


def answer(value: float) -> bytes:
    return json.dumps({"model_version": PACK, "outputs": [{"data": [value, 2.0]}]}).encode()


@pytest.mark.parametrize(("value", "mixed"), [(1.0, 0), (1.0005, 0), (1.1, 20)])
def test_answers_are_counted_and_compared_with_their_pack(value: float, mixed: int) -> None:
    with canned(answer(value)) as (host, port):
        found = work(Job(host, port, "/", "{}", 4, 60.0, 20, expected={PACK: [1.0, 2.0]}))
    assert (found.count, found.failed, found.mixed, found.versions) == (20, 0, mixed, {PACK: 20})
    assert 0 < found.p50_seconds <= found.p99_seconds
    assert len(found.timeline) == 20


def test_an_answer_of_a_pack_that_nobody_published_is_mixed() -> None:
    with canned(answer(1.0)) as (host, port):
        assert work(Job(host, port, "/", "{}", 1, 60.0, 3, expected={"b" * 64: [1.0, 2.0]})).mixed == 3


def test_a_long_answer_is_read_to_its_end() -> None:
    with canned(b"x" * 3_000_000) as (host, port):
        assert work(Job(host, port, "/", "{}", 2, 60.0, 4)).count == 4


@pytest.fixture(scope="module")
def model() -> Model:
    return digits()


@pytest.mark.parametrize("kind", sorted(FAULTS))
def test_every_fault_makes_many_different_requests(model: Model, kind: str) -> None:
    rng = random.Random(0)
    assert len({FAULTS[kind](model, rng) for _ in range(40)}) > 5


def test_it_asks_until_it_is_told_to_stop(tmp_path: Path) -> None:
    done, found = tmp_path / "done", list[Load]()
    with canned(b"{}") as (host, port):
        asking = threading.Thread(
            target=lambda: found.append(work(Job(host, port, "/", "{}", 2, 3600.0, until=str(done))))
        )
        asking.start()
        asking.join(0.5)
        assert asking.is_alive()
        done.touch()
        asking.join(60)
    assert found[0].count > 0
    assert found[0].failed == 0
