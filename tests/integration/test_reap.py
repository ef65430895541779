"""The reaper on a real Prefect server and a real MLflow server: who counts as dead, and who never does."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from mlflow import MlflowClient
from prefect import flow, runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.events import Event
from prefect.logging import disable_run_logger
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Cancelled, Cancelling, Completed, Pending, Running
from prefect.types._datetime import now as prefect_now

from flows.reap import reap as reap_flow
from modelpress.errors import ConfigError, StageError
from modelpress.settings import Settings
from registry import leftovers, runs
from tasks import reaping
from tasks.restarts import check_wanted

SECONDS = 1e-6


@flow(name="optimize")
def ours() -> None:
    """Stands for a run of the line; only its name and its states count."""


@flow(name="train-my-llm")
def others() -> None:
    """Another team's."""


@pytest.fixture
def client(
    prefect_server: str, mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SyncPrefectClient]:
    monkeypatch.setenv("MODELPRESS_HOME", str(tmp_path))
    monkeypatch.setenv("MODELPRESS_TRACKING_URI", mlflow_server)
    with get_client(sync_client=True) as client, disable_run_logger():
        yield client


def started(client: SyncPrefectClient, state: State | None = None, kind: object = ours) -> FlowRun:
    return client.create_flow_run(kind, state=state or Running())  # type: ignore[arg-type]


def beat(client: SyncPrefectClient, run: FlowRun, wrong_by: timedelta = timedelta()) -> None:
    """What Prefect's engine sends; here without its minimum of 30 seconds."""
    event = Event(
        occurred=prefect_now("UTC") + wrong_by,
        event=reaping.HEARTBEAT,
        resource={"prefect.resource.id": f"prefect.flow-run.{run.id}"},
        id=uuid.uuid4(),
    )
    client._client.post("/events", json=[event.model_dump(mode="json")]).raise_for_status()
    for _ in range(200):  # it is persisted by a service of the server's
        if reaping.newest_sign(client, run).token == str(event.id):
            return
        time.sleep(0.1)
    raise AssertionError("the server did not keep the heartbeat")


def suspects(client: SyncPrefectClient, lease: float) -> list[uuid.UUID]:
    return [run.id for run, _ in reaping.silent_runs(client, lease)[1]]


def test_only_a_run_of_ours_that_was_silent_for_the_lease_is_watched(client: SyncPrefectClient) -> None:
    young, unheard, foreign = started(client), started(client), started(client, kind=others)
    for run in (young, foreign):
        beat(client, run)
    assert young.id not in suspects(client, 300)
    found = suspects(client, SECONDS)
    assert young.id in found
    assert unheard.id not in found, "what never sent a heartbeat may have been told to send none"
    assert foreign.id not in found
    for run in (young, unheard, foreign):
        client.set_flow_run_state(run.id, Completed(), force=True)


def test_a_silent_run_that_gives_a_sign_while_it_is_watched_lives(client: SyncPrefectClient) -> None:
    """So it is after the server was away for longer than the lease: all that live look silent then."""
    living, dead, ended = started(client), started(client), started(client)
    for run in (living, dead, ended):
        beat(client, run)
    _, silent = reaping.silent_runs(client, SECONDS)

    def meanwhile(_seconds: float) -> None:
        beat(client, living)
        client.set_flow_run_state(ended.id, Completed(), force=True)

    found = {run.id: (run, why) for run, why in reaping.still_silent(client, silent, 60, meanwhile)}
    assert set(found) & {living.id, dead.id, ended.id} == {dead.id}
    run, why = found[dead.id]
    assert "the last heartbeat was at" in why
    assert reaping.mark_ended(client, run, why)
    state = client.read_flow_run(dead.id).state
    assert state is not None
    assert state.is_crashed()
    assert state.message == f"The reaper found that {why}."
    assert not reaping.mark_ended(client, run, why), "twice is once"
    assert not reaping.mark_ended(client, ended, "late"), "a run that ended between the last look and this stays so"
    assert client.read_flow_run(ended.id).state_name == "Completed"
    client.set_flow_run_state(living.id, Completed(), force=True)


@pytest.mark.parametrize("hours", [-3, 3])
def test_a_run_on_a_machine_with_a_wrong_clock_is_heard(client: SyncPrefectClient, hours: int) -> None:
    run = started(client)
    beat(client, run, timedelta(hours=hours))  # waits until it is heard
    assert run.id not in suspects(client, 300)
    client.set_flow_run_state(run.id, Completed(), force=True)


def test_a_cancelled_run_whose_worker_died_is_cancelled_and_a_pending_one_waits(client: SyncPrefectClient) -> None:
    cancelling, pending = started(client, Cancelling()), started(client, Pending())
    _, silent = reaping.silent_runs(client, SECONDS)
    assert pending.id not in {run.id for run, _ in silent}, "a cluster may take hours to find it a machine"
    dead = [(run, why) for run, why in reaping.still_silent(client, silent, 0) if run.id == cancelling.id]
    assert reaping.mark_ended(client, *dead[0])
    assert client.read_flow_run(cancelling.id).state_name == "Cancelled"
    client.set_flow_run_state(pending.id, Completed(), force=True)


def test_mlflow_runs_end_with_their_flow_run_and_nobody_elses_do(client: SyncPrefectClient, mlflow_server: str) -> None:
    mlflow = MlflowClient(mlflow_server, mlflow_server)
    experiment = mlflow.create_experiment(f"reap-{uuid.uuid4().hex}")
    living, crashed, cancelled = started(client), started(client), started(client, Cancelled(message="by a person"))
    open_runs: dict[str, str] = {}
    for name, owner in (("living", living), ("crashed", crashed), ("cancelled", cancelled), ("unknown", None)):
        flow_run = str(owner.id if owner else uuid.uuid4())
        parent = mlflow.create_run(experiment, tags={leftovers.FLOW_RUN_TAG: flow_run}).info.run_id
        child = mlflow.create_run(experiment, tags={"mlflow.parentRunId": parent}).info.run_id
        open_runs |= {name: parent, f"{name}'s stage": child}
    open_runs["somebody's"] = mlflow.create_run(experiment).info.run_id
    mlflow.set_terminated(open_runs["crashed"], "FAILED")  # its stage is what is left open
    reaping.mark_ended(client, crashed, "its process is dead")

    reaping.end_leftovers(client, {crashed.id}, settle_seconds=3600)
    status = {name: mlflow.get_run(run).info.status for name, run in open_runs.items()}
    assert status["crashed's stage"] == "KILLED"
    assert status["cancelled"] == "RUNNING", "its own process may be about to end it"
    reaping.end_leftovers(client, set(), settle_seconds=0)
    found = {name: mlflow.get_run(run) for name, run in open_runs.items()}
    assert {name: run.info.status for name, run in found.items()} == {
        "living": "RUNNING",
        "living's stage": "RUNNING",
        "crashed": "FAILED",
        "crashed's stage": "KILLED",
        "cancelled": "KILLED",
        "cancelled's stage": "KILLED",
        "unknown": "RUNNING",
        "unknown's stage": "RUNNING",
        "somebody's": "RUNNING",
    }
    assert f"({cancelled.id}) is Cancelled: by a person" in found["cancelled"].data.tags[leftovers.REASON_TAG]
    assert "The reaper found" in found["crashed's stage"].data.tags[leftovers.REASON_TAG]
    client.set_flow_run_state(living.id, Completed(), force=True)


def test_a_run_that_starts_again_ends_what_its_first_start_left_open(
    client: SyncPrefectClient, mlflow_server: str
) -> None:
    mlflow = runs.open_client(Settings())
    experiment = mlflow.create_experiment(f"again-{uuid.uuid4().hex}")
    first, present, other = (
        mlflow.create_run(experiment, tags={leftovers.FLOW_RUN_TAG: flow_run}).info.run_id
        for flow_run in ("a", "a", "b")
    )
    child = mlflow.create_run(experiment, tags={"mlflow.parentRunId": first}).info.run_id
    assert set(leftovers.end_earlier(mlflow, experiment, "a", present, "started again")) == {first, child}
    assert [mlflow.get_run(run).info.status for run in (first, child, present, other)] == [
        *("KILLED", "KILLED", "RUNNING", "RUNNING")
    ]


def test_a_watch_that_is_shorter_than_from_one_heartbeat_to_the_next_is_refused(prefect_server: str) -> None:
    for every in (60, 61, None):
        with (
            temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: every}),
            pytest.raises(ConfigError, match=f"a heartbeat every {every} s"),
        ):
            reaping.check_watch(60.0)
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: 59}):
        reaping.check_watch(60.0)
    with pytest.raises(Exception, match="watch_seconds"):
        reap_flow(watch_seconds=1.0)


@flow(name="cancelled-while-it-runs")
def wanted(cancel: bool) -> None:
    check_wanted()
    if cancel:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(runtime.flow_run.id, Cancelling())
        with pytest.raises(StageError, match="it is Cancelling, and no worker stopped it"):
            check_wanted()


@pytest.mark.parametrize("cancel", [False, True])
def test_a_run_that_was_cancelled_and_that_no_worker_stopped_publishes_nothing(
    prefect_server: str, cancel: bool
) -> None:
    state = wanted(cancel, return_state=True)
    assert not state.is_failed(), state
