"""kill -9 of flow processes, workers and the Prefect server, cancel and SIGTERM: what is redone, and what is left."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from uuid import UUID

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from prefect.client.orchestration import SyncPrefectClient
from prefect.logging import disable_run_logger
from prefect.states import AwaitingRetry, Cancelling

from flows.optimize import optimize
from registry import leftovers
from tasks import reaping
from tasks.restarts import start_again
from tests.integration.conftest import QUIET, free_port
from tests.integration.killing import CONFIG, Place, Server, prefect_at, until, wait_for

FURTHER = [
    ("before", "stages/distill/", 1),  # its work is done, and nobody knows
    ("after", "stages/quantize/", 1),  # between two stages
]
"""The benchmark `recovery` has a kill at each boundary and inside each stage."""

pytestmark = [pytest.mark.e2e, pytest.mark.faults, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Prefect server of this module alone: it is killed."""
    server = Server(tmp_path_factory.mktemp("prefect"), free_port(), QUIET)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def client(server: Server) -> Iterator[SyncPrefectClient]:
    with prefect_at(server.url) as client:
        yield client


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory, server: Server, mlflow_server: str) -> Iterator[Place]:
    environment = {**QUIET, "PREFECT_API_URL": server.url, "MODELPRESS_TRACKING_URI": mlflow_server}
    place = Place(tmp_path_factory.mktemp("killed"), environment)
    yield place
    place.close()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, server: Server, mlflow_server: str) -> str:
    """The digest of a run that nobody disturbs."""
    home = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch, prefect_at(server.url):
        patch.setenv("MODELPRESS_HOME", str(home))
        patch.setenv("MODELPRESS_TRACKING_URI", mlflow_server)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as those have that are killed: sums of other threads are other sums
        try:
            return optimize(CONFIG).pack
        finally:
            torch.set_num_threads(threads)


def attempts(mlflow_server: str, flow_run: object) -> list[MlflowRun]:
    """The MLflow runs of a flow run, one for each start, oldest first."""
    mlflow = MlflowClient(mlflow_server, mlflow_server)
    experiment = mlflow.get_experiment_by_name(CONFIG.name)
    assert experiment is not None
    condition = f"tags.`{leftovers.FLOW_RUN_TAG}` = '{flow_run}'"
    return list(mlflow.search_runs([experiment.experiment_id], condition, order_by=["attributes.start_time ASC"]))


def stages(mlflow_server: str, parent: MlflowRun) -> dict[str, MlflowRun]:
    mlflow = MlflowClient(mlflow_server, mlflow_server)
    found = mlflow.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    return {str(run.data.tags["mlflow.runName"]): run for run in found}


def reaped(client: SyncPrefectClient, run: UUID) -> None:
    """What the flow `reap` does with a dead run, without its waits: here it is known that the process is dead."""
    with disable_run_logger():
        _, silent = reaping.silent_runs(client, 1e-6)
        dead = [(one, why) for one, why in reaping.still_silent(client, silent, 1.0) if one.id == run]
        assert reaping.mark_ended(client, *dead[0])
        reaping.end_leftovers(client, {run}, settle_seconds=3600)


@pytest.mark.parametrize("further", [[], FURTHER], ids=["twice", "four times"])
def test_killed_inside_stages_and_between_them_a_run_repeats_only_what_was_cut_off(
    place: Place, client: SyncPrefectClient, expected: str, mlflow_server: str, further: list[tuple[str, str, int]]
) -> None:
    """The worker sees each death, and starts the run again, as its tag asks."""
    kills = [
        ("after", "training/source/", 7),  # inside a stage, in the middle of an epoch
        *further,
        ("before", "packs/killed/", 1),  # every blob is published, and no manifest
    ]
    run = client.create_flow_run_from_deployment(place.deploy(client, restarts=len(kills))).id
    place.order(*kills)
    place.start_worker()
    found = wait_for(client, run, "Completed", "Failed")
    assert found.state_name == "Completed", found.state
    assert found.run_count == len(kills) + 1
    assert place.published() == [expected]

    starts = attempts(mlflow_server, run)
    assert [one.info.status for one in starts] == ["KILLED"] * len(kills) + ["FINISHED"]
    assert all("was started again" in one.data.tags[leftovers.REASON_TAG] for one in starts[:-1])
    source = stages(mlflow_server, starts[1])["source"]
    assert source.data.tags["resumed"] == "the training goes on behind update 7 of 15"
    if len(kills) > 2:
        distill = stages(mlflow_server, starts[2])["distill"]
        assert distill.data.tags["resumed"] == "the training was done before"
    assert starts[-1].data.tags["recomputed"] == "upload", "the version was registered by the undisturbed run"
    assert not {one.info.status for start in starts for one in stages(mlflow_server, start).values()} & {"RUNNING"}
    for stage, count in {"source": 1, "distill": 1, "prune": 1, "export": 2, "quantize": 1, "upload": 1}.items():
        assert place.writes(f"stages/{stage}/") == count, f"{stage} was recorded once for each of its places"
    assert not list((place.home / "work" / "training").rglob("[0-9]"))


def test_a_run_outlives_its_worker_and_the_server(
    place: Place, server: Server, client: SyncPrefectClient, expected: str, mlflow_server: str
) -> None:
    run = client.create_flow_run_from_deployment(place.deploy(client, restarts=0)).id
    place.pause()
    worker = place.start_worker()
    place.wait_paused()
    os.killpg(worker.pid, signal.SIGKILL)
    server.kill()
    place.go_on()
    until("a record that is written without a server", lambda: place.writes("stages/source/"))
    server.start()
    found = wait_for(client, run, "Completed", "Failed")
    assert found.state_name == "Completed", found.state
    assert found.run_count == 1
    assert place.published() == [expected]
    (only,) = attempts(mlflow_server, run)
    assert only.info.status == "FINISHED"


def test_what_died_with_its_worker_is_reaped_goes_on_elsewhere_and_can_be_cancelled(
    place: Place, client: SyncPrefectClient, expected: str, mlflow_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELPRESS_HOME", str(place.home))
    monkeypatch.setenv("MODELPRESS_TRACKING_URI", mlflow_server)
    run = client.create_flow_run_from_deployment(place.deploy(client, restarts=1)).id
    place.pause()
    worker = place.start_worker()
    place.wait_paused()
    os.killpg(worker.pid, signal.SIGKILL)
    alive = client.read_flow_run(run)
    until("its first heartbeat", lambda: reaping.newest_sign(client, alive).heartbeat)
    for process in place.flow_processes(run):
        os.kill(process, signal.SIGKILL)
    assert client.read_flow_run(run).state_name == "Running", "nobody is left who could know"

    reaped(client, run)
    (first,) = attempts(mlflow_server, run)
    assert first.info.status == "KILLED"
    assert "The reaper found that its process is dead" in first.data.tags[leftovers.REASON_TAG]
    assert {one.info.status for one in stages(mlflow_server, first).values()} == {"KILLED"}
    assert start_again(client, run)

    (place.home / "paused").unlink()
    place.start_worker()
    place.wait_paused()
    processes = place.flow_processes(run)
    assert processes
    client.set_flow_run_state(run, Cancelling())  # what the button does, and `prefect flow-run cancel`
    wait_for(client, run, "Cancelled")
    until("its processes to end", lambda: not place.flow_processes(run))
    assert not place.published()
    second = attempts(mlflow_server, run)[1]
    assert second.info.status == "KILLED"
    assert stages(mlflow_server, second)["source"].info.status == "KILLED"
    assert not start_again(client, run), "who cancelled does not want it"

    place.go_on()
    client.set_flow_run_state(run, AwaitingRetry())  # what the button Retry does
    found = wait_for(client, run, "Completed", "Failed")
    assert found.state_name == "Completed", found.state
    assert place.published() == [expected]
    third = attempts(mlflow_server, run)[2]
    assert stages(mlflow_server, third)["source"].data.tags["resumed"].startswith("the training goes on behind update")


def test_a_worker_that_is_told_to_stop_leaves_no_process_and_its_run_goes_on_elsewhere(
    place: Place, client: SyncPrefectClient, expected: str, mlflow_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefect's worker kills its runs then, and says nothing of them: the reaper does."""
    monkeypatch.setenv("MODELPRESS_HOME", str(place.home))
    monkeypatch.setenv("MODELPRESS_TRACKING_URI", mlflow_server)
    run = client.create_flow_run_from_deployment(place.deploy(client, restarts=1)).id
    place.pause()
    worker = place.start_worker()
    place.wait_paused()
    alive = client.read_flow_run(run)
    until("its first heartbeat", lambda: reaping.newest_sign(client, alive).heartbeat)
    worker.send_signal(signal.SIGTERM)
    worker.wait(120)
    until("its processes to end", lambda: not place.flow_processes(run))
    assert not place.published()
    reaped(client, run)
    assert start_again(client, run)
    place.go_on()
    place.start_worker()
    found = wait_for(client, run, "Completed", "Failed")
    assert found.state_name == "Completed", found.state
    assert place.published() == [expected]
    assert [one.info.status for one in attempts(mlflow_server, run)] == ["KILLED", "FINISHED"]
