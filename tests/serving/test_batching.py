"""Joining requests: who goes together, who never does, and what becomes of those that give up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from serving.batching import Batcher, Bounds
from serving.engine import Engine
from serving.protocol import DeadlineError, RequestError
from serving.rows import Rows
from tests.serving.conftest import WIDTH, lookup_model, scale_model

pytestmark = pytest.mark.anyio
Call = Callable[..., Any]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Gated:
    """A real engine behind a gate: what runs waits until it is opened, so that a test says what is waiting."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.rows, self.row_seconds = engine, engine.rows, 1e-6
        self.entered, self.gate = threading.Event(), threading.Event()
        self.batches: list[int] = []
        self.broken: Exception | None = None

    def infer(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        self.entered.set()
        assert self.gate.wait(60)
        if self.broken is not None:
            raise self.broken
        self.batches.append(len(next(iter(inputs.values()))))
        return self.engine.infer(inputs, outputs)


def gated(press: Call, repository: Call, model: Any, name: str = "scale") -> Gated:
    press(model, name)
    return Gated(repository(name).model(name).answering().engine)


@pytest.fixture
def scale(press: Call, repository: Call) -> Iterator[Gated]:
    made = gated(press, repository, scale_model(2.0))
    yield made
    made.gate.set()


def x(value: float, rows: int = 1) -> dict[str, np.ndarray]:
    return {"x": np.full((rows, WIDTH), value, np.float32)}


async def busy(
    batcher: Batcher, engine: Gated, inputs: Any = None, outputs: Sequence[str] = ("y",)
) -> asyncio.Task[Any]:
    """The one thread is in the engine, and stays there."""
    task = asyncio.create_task(batcher.run(engine, inputs or x(1.0), outputs))
    await asyncio.to_thread(engine.entered.wait, 60)
    return task


async def queued(batcher: Batcher, engine: Gated, asks: Sequence[Any], outputs: Sequence[str] = ("y",)) -> list[Any]:
    tasks = [asyncio.create_task(batcher.run(engine, one, outputs)) for one in asks]
    while batcher.waiting < len(asks):
        await asyncio.sleep(0.001)
    return tasks


async def test_what_waits_is_joined_and_each_gets_its_own_rows(scale: Gated) -> None:
    batcher = Batcher(1)
    first = await busy(batcher, scale)
    tasks = await queued(batcher, scale, [x(float(number), 1 + number % 3) for number in range(2, 9)])
    scale.gate.set()
    assert (await first)["y"][0, 0] == 2 * WIDTH
    for number, task in enumerate(tasks, 2):
        found = (await task)["y"]
        assert np.array_equal(found, np.full((1 + number % 3, 10), 2.0 * WIDTH * number, np.float32))
    assert scale.batches == [1, 15]
    batcher.close()


@pytest.mark.parametrize(
    ("bounds", "row_seconds", "batches"),
    [
        (Bounds(rows=4), 1e-6, [1, 4, 2]),
        (Bounds(rows=1), 1e-6, [1] * 7),
        (Bounds(rows=64, run_seconds=0.003), 1e-3, [1, 3, 3]),
        (Bounds(rows=64, run_seconds=0.003), 1.0, [1] * 7),
    ],
)
async def test_batches_keep_their_bounds(
    scale: Gated, bounds: Bounds, row_seconds: float, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for weight in ("RISING", "FALLING"):  # what the machine measures must not decide
        monkeypatch.setattr(f"serving.batching.{weight}", 0.0)
    scale.row_seconds = row_seconds
    batcher = Batcher(1, bounds)
    first = await busy(batcher, scale)
    tasks = await queued(batcher, scale, [x(3.0)] * 6)
    scale.gate.set()
    await asyncio.gather(first, *tasks)
    assert scale.batches == batches
    batcher.close()


async def test_a_model_whose_rows_depend_on_company_is_never_joined(scale: Gated) -> None:
    scale.rows = Rows(False, "because")
    batcher = Batcher(1)
    first = await busy(batcher, scale)
    tasks = await queued(batcher, scale, [x(3.0, 2)] * 3)
    scale.gate.set()
    await asyncio.gather(first, *tasks)
    assert scale.batches == [1, 2, 2, 2]
    batcher.close()


def ids(length: int, last: int = 5) -> dict[str, np.ndarray]:
    row = np.array([[3] * (length - 1) + [last]], np.int64)
    return {"input_ids": row, "attention_mask": np.ones((1, length, 1), np.float32)}


async def test_other_lengths_go_apart_and_a_bad_value_is_its_sender_s_alone(press: Call, repository: Call) -> None:
    lookup = gated(press, repository, lookup_model(), "lookup")
    assert lookup.rows.joined, lookup.rows.reason
    batcher = Batcher(1)
    first = await busy(batcher, lookup, ids(4))
    tasks = await queued(batcher, lookup, [ids(2), ids(3), ids(2, last=1000), ids(3), ids(2)])
    lookup.gate.set()
    await first
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(found[2], RequestError)
    assert [one["y"].shape for number, one in enumerate(found) if number != 2] == [(1, n, 8) for n in (2, 3, 3, 2)]
    assert found[0]["y"][0, 1].tolist() == [float(value) for value in range(40, 48)]
    assert lookup.batches == [1, 3, 1, 1, 1, 2]  # the three of length 2 together, then each alone
    batcher.close()


async def test_a_deadline_that_passed_takes_a_request_out_of_the_queue(scale: Gated) -> None:
    batcher = Batcher(1)
    first = await busy(batcher, scale)
    loop = asyncio.get_running_loop()
    with pytest.raises(DeadlineError):
        await batcher.run(scale, x(2.0), ["y"], deadline=loop.time() - 1)
    with pytest.raises(DeadlineError):
        await batcher.run(scale, x(2.0), ["y"], deadline=loop.time() + 0.01)
    scale.gate.set()
    await first
    assert (await batcher.run(scale, x(3.0), ["y"], deadline=loop.time() + 60))["y"][0, 0] == 6 * WIDTH
    assert scale.batches == [1, 1]
    batcher.close()


async def test_a_deadline_holds_for_what_runs_too(scale: Gated) -> None:
    batcher = Batcher(1)
    with pytest.raises(DeadlineError):
        await batcher.run(scale, x(2.0), ["y"], deadline=asyncio.get_running_loop().time() + 0.05)
    scale.gate.set()
    assert (await batcher.run(scale, x(3.0), ["y"]))["y"][0, 0] == 6 * WIDTH  # the thread came back
    batcher.close()


async def test_who_goes_away_is_not_run(scale: Gated) -> None:
    batcher = Batcher(1)
    first = await busy(batcher, scale)
    tasks = await queued(batcher, scale, [x(2.0), x(3.0), x(4.0)])
    tasks[1].cancel()
    await asyncio.wait([tasks[1]])
    scale.gate.set()
    found = await asyncio.gather(first, *tasks, return_exceptions=True)
    assert [one["y"][0, 0] / WIDTH for one in found if isinstance(one, dict)] == [2.0, 4.0, 8.0]
    assert isinstance(found[2], asyncio.CancelledError)
    assert scale.batches == [1, 2]
    batcher.close()


async def test_with_a_delay_company_is_waited_for_until_the_batch_is_full(scale: Gated) -> None:
    batcher = Batcher(2, Bounds(rows=3, delay_seconds=3600))
    scale.gate.set()
    first = asyncio.create_task(batcher.run(scale, x(1.0), ["y"]))
    while not batcher.waiting:
        await asyncio.sleep(0.001)
    assert not scale.entered.is_set()  # though both threads are free
    await asyncio.gather(first, batcher.run(scale, x(2.0, 2), ["y"]))
    assert scale.batches == [3]
    batcher.close()


async def test_with_a_delay_nobody_waits_for_ever(scale: Gated) -> None:
    batcher = Batcher(1, Bounds(delay_seconds=0.01))
    scale.gate.set()
    assert (await batcher.run(scale, x(2.0), ["y"]))["y"][0, 0] == 4 * WIDTH
    batcher.close()


async def test_an_unforeseen_error_reaches_all_and_the_thread_comes_back(scale: Gated) -> None:
    batcher = Batcher(1)
    scale.broken = ZeroDivisionError("once")
    first = await busy(batcher, scale)
    tasks = await queued(batcher, scale, [x(2.0), x(3.0)])
    scale.gate.set()
    found = await asyncio.gather(first, *tasks, return_exceptions=True)
    assert [type(one) for one in found] == [ZeroDivisionError] * 3
    scale.broken = None
    assert (await batcher.run(scale, x(3.0), ["y"]))["y"][0, 0] == 6 * WIDTH
    batcher.close()


async def test_the_end_waits_for_what_runs_and_for_nothing_else(scale: Gated) -> None:
    batcher = Batcher(1)
    first = await busy(batcher, scale)
    (waiting,) = await queued(batcher, scale, [x(2.0)])
    threading.Timer(0.05, scale.gate.set).start()
    batcher.close()
    assert (await first)["y"][0, 0] == 2 * WIDTH
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert scale.batches == [1]


async def test_what_a_row_takes_is_learnt(scale: Gated) -> None:
    batcher = Batcher(1)
    scale.gate.set()
    scale.row_seconds = 1e3
    for _ in range(20):
        await batcher.run(scale, x(2.0, 4), ["y"])
    assert scale.row_seconds < 20
    batcher.close()
