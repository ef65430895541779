"""The line with workers, on a real Prefect server: the pack is the same, also when a worker is killed on the way."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from flows.optimize import OptimizeResult, optimize
from modelpress.config import OptimizeConfig, WorkersConfig
from modelpress.settings import Settings
from modelpress.store.base import open_store

pytestmark = pytest.mark.distributed

RECIPE = OptimizeConfig.model_validate(
    {
        "name": "sliced",
        "workload": {"kind": "custom", "factory": "tests.integration.small_workloads:Small"},
        "plan": {"num_bits": [8, 4], "group_sizes": [16], "points": 0, "max_disagreement": 0.05},
        "evaluate": {"batch_sizes": [1], "latency_seconds": 0.01, "max_quality_drop": 1.0},
        "promote": False,
    }
)
WORKERS = WorkersConfig(count=2, threads=1, slices=3)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: str, mlflow_server: str) -> Path:
    monkeypatch.setenv("MODELPRESS_TRACKING_URI", mlflow_server)
    for name in ("MODELPRESS_STORE", "MODELPRESS_WORK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run_in(home: Path, monkeypatch: pytest.MonkeyPatch, workers: WorkersConfig | None) -> OptimizeResult:
    monkeypatch.setenv("MODELPRESS_HOME", str(home))
    return optimize(RECIPE.model_copy(update={"workers": workers}))


def kill_first_worker(killed: list[int]) -> None:
    """Wait for a process that runs slices, and kill it."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        for child in psutil.Process().children():
            try:
                if "modelpress.workers.process" in child.cmdline():
                    os.kill(child.pid, signal.SIGKILL)
                    killed.append(child.pid)
                    return
            except psutil.Error:
                continue
        time.sleep(0.02)


def test_a_run_with_workers_publishes_the_pack_of_one_without_and_a_killed_one_costs_its_slice(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = run_in(home / "alone", monkeypatch, None)
    killed: list[int] = []
    killer = threading.Thread(target=kill_first_worker, args=(killed,))
    killer.start()
    shared = run_in(home / "shared", monkeypatch, WORKERS)
    killer.join()
    assert len(killed) == 1
    assert shared.pack == alone.pack
    assert [row.quality for row in shared.stages] == [row.quality for row in alone.stages]

    with get_client(sync_client=True) as client:
        runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[_flow_run(shared)])))
    slices = [run for run in runs if run.name.startswith(("answers-", "sensitivities-"))]
    # Four models are judged (source, its graph, the exported one, the planned one), two of which are the same bytes;
    # one is planned. Each in three slices, and one slice was tried twice.
    assert {run.name for run in slices} == {
        f"{kind}-{one}" for kind in ("answers", "sensitivities") for one in range(3)
    }
    assert [run.run_count for run in slices if run.run_count != 1] == [2]
    assert all(run.state is not None and run.state.is_completed() for run in slices)
    assert not [one for one in psutil.Process().children() if "modelpress.workers.process" in one.cmdline()]
    work = open_store(Settings().work_uri)
    assert list(work.list("stages/slice-answers/"))
    assert list(work.list("stages/slice-sensitivities/"))


def _flow_run(result: OptimizeResult) -> str:
    return result.flow_run_url.rpartition("/")[2]
