"""GPU slots on a real Prefect server, with declared devices: what is held, by how many, and until when."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, GlobalConcurrencyLimitUpdate
from prefect.client.schemas.filters import FlowRunFilter
from prefect.concurrency.context import ConcurrencyContext

from modelpress.config import GpuConfig
from modelpress.errors import ConfigError, SetupError, StageError
from tasks import devices
from tasks.devices import Device, held, placed
from tests.conftest import ROOT

GIB = 2**30


@pytest.fixture
def two() -> list[Device]:
    """Two devices of 8 GiB that nobody else knows."""
    return [Device(f"GPU-{uuid.uuid4()}", "declared", 8 * GIB + 5, index) for index in range(2)]


def taken(device: Device) -> int:
    with get_client(sync_client=True) as client:
        return client.read_global_concurrency_limit_by_name(device.limit).active_slots


class Holder:
    """A process that asks for a device; see `tests.integration.gpu_holder`."""

    def __init__(self, url: str, home: Path, name: str, found: list[Device], memory: int | None, wait: float) -> None:
        asked = {"name": name, "devices": [dataclasses.asdict(one) for one in found], "memory": memory, "wait": wait}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.gpu_holder", json.dumps(asked)],
            cwd=ROOT,
            env={**os.environ, "PREFECT_API_URL": url, "PREFECT_HOME": str(home), "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(home / f"{name}.log").open("wb"),
            text=True,
        )

    def line(self) -> dict[str, Any]:
        """What it says next; waits for it."""
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        assert said, f"{self.process.args!r} ended with {self.process.wait()}"
        found: dict[str, Any] = json.loads(said)
        return found

    def let_go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()


Start = Callable[..., Holder]


@pytest.fixture
def start(prefect_server: str, tmp_path: Path) -> Iterator[Start]:
    begun: list[Holder] = []

    def make(name: str, found: list[Device], memory: int | None = None, wait: float = 240) -> Holder:
        begun.append(Holder(prefect_server, tmp_path, name, found, memory, wait))
        return begun[-1]

    yield make
    for holder in begun:
        holder.process.kill()
        holder.process.wait()
        for stream in (holder.process.stdin, holder.process.stdout):
            if stream is not None:
                stream.close()


@pytest.mark.distributed
def test_two_runs_never_overlap_on_a_device(start: Start, two: list[Device]) -> None:
    first, second = start("first", two), start("second", two)
    held_first, held_second = first.line(), second.line()
    assert {held_first["device"], held_second["device"]} == {one.uuid for one in two}
    assert [taken(one) for one in two] == [8, 8]
    third = start("third", two)
    second.let_go()
    gone, came = second.line(), third.line()
    assert came["device"] == held_second["device"]
    assert came["at"] >= gone["at"]
    first.let_go()
    third.let_go()
    assert first.process.wait(60) == third.process.wait(60) == 0
    assert [taken(one) for one in two] == [0, 0]


@pytest.mark.e2e
def test_a_killed_holder_frees_its_slots_when_the_lease_is_over(start: Start, two: list[Device]) -> None:
    dead = start("dead", two[:1])
    dead.line()
    dead.process.send_signal(signal.SIGKILL)
    dead.process.wait()
    assert taken(two[0]) == 8, "the server cannot know yet"
    heir = start("heir", two[:1])
    assert heir.line()["device"] == two[0].uuid
    heir.let_go()
    assert heir.process.wait(60) == 0
    assert taken(two[0]) == 0


@pytest.mark.e2e
def test_a_stage_that_lost_its_lease_ends_and_says_so(prefect_server: str, two: list[Device]) -> None:
    """Renewals come every 45 seconds: the server takes no shorter lease than a minute."""

    @flow
    def loser() -> None:
        with held(GpuConfig(), "distill", two[:1], 60):
            context = ConcurrencyContext.get()
            assert context is not None
            with get_client(sync_client=True) as client:
                client.release_concurrency_slots_with_lease(context.cleanup_lease_ids[-1])
            for _ in range(2000):  # in bytecode, where another thread's exception can reach it
                time.sleep(0.1)

    with pytest.raises(StageError, match="its lease could not be renewed"):
        loser()
    assert taken(two[0]) == 0


def test_runs_share_a_device_when_they_say_what_they_need(prefect_server: str, two: list[Device]) -> None:
    part = GpuConfig(memory=3 * GIB - 1, wait_seconds=0)

    @flow
    def both() -> list[int]:
        with held(part, "a", two[:1], 60), held(part, "b", two[:1], 60):
            counts = [taken(two[0])]
            with held(part, "c", two, 60) as other:  # 2 GiB are left of the first
                counts += [taken(two[0]), taken(other)]
        return [*counts, taken(two[0])]

    assert both() == [6, 6, 3, 0]


def test_who_waits_in_vain_is_told_who_holds_it(
    prefect_server: str, two: list[Device], caplog: pytest.LogCaptureFixture
) -> None:
    @flow(flow_run_name="the-owner")
    def owner() -> str:
        with held(GpuConfig(), "distill", two[:1], 60):
            with pytest.raises(SetupError) as refused, held(GpuConfig(wait_seconds=0), "distill", two[:1], 60):
                pass
            with get_client(sync_client=True) as client:
                (run,) = client.read_flow_runs(flow_run_filter=tagged_with(two[0]))
        assert run.name == "the-owner"
        return str(refused.value)

    with caplog.at_level(logging.INFO, logger="prefect"):
        said = owner()
    assert "waiting for a GPU for distill" in said
    assert "8 of 8 slots taken; the-owner (" in said
    assert "gpu.wait_seconds" in said
    with get_client(sync_client=True) as client:
        assert not client.read_flow_runs(flow_run_filter=tagged_with(two[0])), "the tag goes with the slots"
    assert taken(two[0]) == 0


def tagged_with(device: Device) -> FlowRunFilter:
    return FlowRunFilter.model_validate({"tags": {"all_": [device.limit]}})


def test_a_need_that_no_device_has_is_refused_at_once(prefect_server: str, two: list[Device]) -> None:
    @flow
    def greedy() -> None:
        with held(GpuConfig(memory=9 * GIB), "distill", two, 60):
            raise AssertionError

    with pytest.raises(ConfigError, match="one with 9 GiB"):
        greedy()


def test_a_limit_that_lets_too_many_in_is_an_error_and_a_smaller_one_a_reserve(
    prefect_server: str, two: list[Device]
) -> None:
    @flow
    def run() -> int:
        with held(GpuConfig(), "distill", two[:1], 60):
            return taken(two[0])

    with get_client(sync_client=True) as client:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=two[0].limit, limit=80))
        with pytest.raises(SetupError, match=rf"80 slots[\s\S]*prefect gcl delete {two[0].limit}"):
            run()
        client.update_global_concurrency_limit(two[0].limit, GlobalConcurrencyLimitUpdate(limit=6, active=False))
        with pytest.raises(SetupError, match="switched off"):
            run()
        client.update_global_concurrency_limit(two[0].limit, GlobalConcurrencyLimitUpdate(active=True))
    assert run() == 6


def test_without_a_gpu_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a request")

    monkeypatch.setattr(devices, "get_client", never)
    monkeypatch.setattr(devices, "cuda_devices", never)
    with placed(None, "distill"):
        pass
