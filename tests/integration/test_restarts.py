"""Whether a crashed run goes on, on a real Prefect server: a worker's second report takes nothing back."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.states import Cancelled, Crashed, Running

from tasks import restarts


@flow(name="optimize")
def ours() -> None:
    """Stands for a run of the line; only its name and its states count."""


@pytest.fixture
def client(prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncPrefectClient]:
    monkeypatch.setattr(restarts, "SETTLED", timedelta(seconds=2))
    monkeypatch.setattr(restarts, "SETTLE_LOOKS", 10_000)
    with get_client(sync_client=True) as client:
        yield client


def crashed(client: SyncPrefectClient, *tags: str) -> UUID:
    """A run of a deployment with these tags, which began and whose process died."""
    deployment = client.create_deployment(client.create_flow(ours), name="-".join(["restarts", *tags]), tags=list(tags))
    run = client.create_flow_run_from_deployment(deployment).id
    client.set_flow_run_state(run, Running(), force=True)
    client.set_flow_run_state(run, Crashed(message="as the runner saw it"), force=True)
    return run


def settle(client: SyncPrefectClient, run: UUID, *meanwhile: object) -> bool:
    """Let the process that the hook leaves behind do its work; between its looks these states come."""
    states = iter(meanwhile)

    def sleep(_seconds: float) -> None:
        if (state := next(states, None)) is not None:
            client.set_flow_run_state(run, state, force=True)  # type: ignore[arg-type]

    return restarts.start_settled(client, run, sleep)


def test_a_run_is_scheduled_behind_the_last_report_of_its_death(client: SyncPrefectClient) -> None:
    run = crashed(client, "restarts:1")
    assert settle(client, run, Crashed(message="as the worker saw it"))
    found = client.read_flow_run(run)
    assert found.state is not None
    assert found.state.name == "AwaitingRetry"
    assert found.state.message == "Start 2 of at most 2, as the process died: as the worker saw it"


def test_what_was_cancelled_in_the_meantime_stays_so(client: SyncPrefectClient) -> None:
    run = crashed(client, "restarts:1")
    assert not settle(client, run, Cancelled())
    assert client.read_flow_run(run).state_name == "Cancelled"


def test_it_starts_as_often_as_its_tag_says_and_not_once_more(client: SyncPrefectClient) -> None:
    never, once = crashed(client), crashed(client, "restarts:1")
    assert not settle(client, never)
    assert settle(client, once)
    client.set_flow_run_state(once, Running(), force=True)
    client.set_flow_run_state(once, Crashed(), force=True)
    assert not settle(client, once)
    assert client.read_flow_run(once).state_name == "Crashed"


def test_the_reaper_finds_those_whose_hook_never_ran(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "SETTLED", timedelta(hours=1))
    may, may_not = crashed(client, "restarts:1"), crashed(client)
    assert may not in {run.id for run in restarts.crashed_and_waiting(client, ["optimize"])}, "its hook may be at it"
    monkeypatch.setattr(restarts, "SETTLED", timedelta(seconds=0))
    found = {run.id for run in restarts.crashed_and_waiting(client, ["optimize"])}
    assert may in found
    assert may_not not in found
    assert may not in {run.id for run in restarts.crashed_and_waiting(client, ["promote"])}
    assert restarts.start_again(client, may)
    assert may not in {run.id for run in restarts.crashed_and_waiting(client, ["optimize"])}
