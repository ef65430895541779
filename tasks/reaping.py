"""Flow runs whose process is dead, told from those that are only slow; and what becomes of them.

Prefect's engine sends an event, `prefect.flow-run.heartbeat`, from a thread of its own, and a worker that is there
reports a process that ended. So a run which says Running is dead when no sign of it came for a lease, and none comes
either while it is watched, longer than from one heartbeat to the next, with a server that answers. The first alone
would be wrong: after a pause of the server every run that lives looks silent, and the clocks of two machines differ.
The second needs no clock: another heartbeat came, or none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import OrchestrationResult, SetStateStatus
from prefect.events.filters import EventFilter, EventNameFilter, EventOccurredFilter, EventResourceFilter
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.settings import get_current_settings
from prefect.states import Cancelled, Crashed

from modelpress.errors import ConfigError
from modelpress.reports import Report
from modelpress.settings import read_settings
from modelpress.store.base import open_store
from registry import leftovers, runs
from tasks.restarts import crashed_and_waiting, start_again
from tasks.trainings import clear_finished

FLOWS = [
    *("optimize", "optimize-part", "optimize-in-jobs", "promote", "rollback", "reconcile", "report-failure"),
    *("evaluate-published", "collect", "scrub", "reap", "promote-canary", "canary"),
    *("optimize-variants", "optimize-variant"),
]
"""Whose runs are looked at: ours. Another team's flows on the same server are theirs."""
HEARTBEAT = "prefect.flow-run.heartbeat"
UNHEARD_HOURS = 24.0
"""After which a run counts as dead that never sent a heartbeat: it may wait in a cluster for a machine, or it was told
to send none."""
PAGE = 200


class ReapReport(Report):
    """What was ended."""

    looked_at: int
    """Runs that said Running, Pending or Cancelling."""
    crashed: list[str]
    """Flow runs marked as crashed: name and id."""
    spared: list[str]
    """Those that were silent and gave a sign while they were watched."""
    restarted: list[str]
    """Of those that crashed, now or earlier, the ones that start again."""
    mlflow_ended: list[str]
    """MLflow runs that were ended."""
    trainings_removed: int
    """States of trainings whose stage is recorded."""


@dataclass(frozen=True)
class Sign:
    """The newest sign of a run's life."""

    at: datetime
    """When: by the server's clock for a heartbeat, by the run's for a state."""
    token: str
    """The event or the state itself: another one is another sign, whatever the clocks say."""
    heartbeat: bool


@task(name="reap", task_run_name="reap", cache_policy=NO_CACHE)
def reap(lease_seconds: float, watch_seconds: float) -> ReapReport:
    """Mark the dead as crashed, end their runs in MLflow, start again those that ask for it."""
    log = get_run_logger()
    check_watch(watch_seconds)
    with get_client(sync_client=True) as client:
        looked_at, suspects = silent_runs(client, lease_seconds)
        dead = {run.id: (run, why) for run, why in still_silent(client, suspects, watch_seconds)}
        spared = [run for run, _ in suspects if run.id not in dead]
        for run in spared:
            log.info("reap: %s (%s) was silent, and lives", run.name, run.id)
        crashed = [run for run, why in dead.values() if mark_ended(client, run, why)]
        for run in crashed:
            log.warning("reap: %s (%s) is ended: %s", run.name, run.id, dead[run.id][1])
        ended = end_leftovers(client, {run.id for run in crashed}, watch_seconds)
        again = {run.id: run for run in [*crashed, *crashed_and_waiting(client, FLOWS)]}
        restarted = [run for run in again.values() if start_again(client, run.id)]
    settings = read_settings()
    removed = list(clear_finished(open_store(settings.work_uri, settings)))
    return ReapReport(
        looked_at=looked_at,
        crashed=[f"{run.name} {run.id}" for run in crashed],
        spared=[f"{run.name} {run.id}" for run in spared],
        restarted=[f"{run.name} {run.id}" for run in restarted],
        mlflow_ended=ended,
        trainings_removed=len(removed),
    )


def check_watch(watch_seconds: float) -> None:
    """Refuse to judge by a silence that is no silence.

    Raises:
        ConfigError: heartbeats come less often than that, as far as this process knows, or not at all.
    """
    every = get_current_settings().flows.heartbeat_frequency
    if every is None or watch_seconds <= every:
        raise ConfigError(
            "looking for dead runs",
            found=f"watch_seconds {watch_seconds:g}, and a heartbeat every {every} s",
            expected="to watch a silent run for longer than from one heartbeat to the next",
            fix="set PREFECT_FLOWS_HEARTBEAT_FREQUENCY to 30, for all runs as the pools in infra/pools/ do, or raise "
            "watch_seconds",
        )


def silent_runs(client: SyncPrefectClient, lease_seconds: float) -> tuple[int, list[tuple[FlowRun, Sign]]]:
    """How many runs are under way, and those whose newest sign is older than they may be silent."""
    now = datetime.now(UTC)
    under_way = _under_way(client)
    suspects = []
    for run in under_way:
        sign = newest_sign(client, run)
        if now - sign.at > timedelta(seconds=_patience(run, sign, lease_seconds)):
            suspects.append((run, sign))
    return len(under_way), suspects


def still_silent(
    client: SyncPrefectClient,
    suspects: Iterable[tuple[FlowRun, Sign]],
    watch_seconds: float,
    sleep: Callable[[float], None] = time.sleep,
) -> list[tuple[FlowRun, str]]:
    """Those that give no sign while they are watched, and why they count as dead."""
    suspects = list(suspects)
    if not suspects:
        return []
    sleep(watch_seconds)
    dead = []
    for before, sign in suspects:
        try:
            run = client.read_flow_run(before.id)
        except ObjectNotFound:
            continue  # deleted meanwhile
        if newest_sign(client, run).token == sign.token:
            what = "heartbeat" if sign.heartbeat else f"change of state (it says {run.state_name})"
            dead.append((run, f"its process is dead: the last {what} was at {sign.at:%Y-%m-%d %H:%M:%S} UTC"))
    return dead


def newest_sign(client: SyncPrefectClient, run: FlowRun) -> Sign:
    """The newest heartbeat, or, where none was heard, the run's state."""
    assert run.state is not None  # a run under way has one
    began = run.state.timestamp
    state = Sign(began, str(run.state.id), heartbeat=False)
    # A day on either side: events have the time of the run's clock, which may be wrong, and a heartbeat that were not
    # seen would be a death.
    around = EventOccurredFilter(since=began - timedelta(days=1), until=datetime.now(UTC) + timedelta(days=1))
    heard = client.read_events(
        EventFilter(
            occurred=around,
            event=EventNameFilter(name=[HEARTBEAT]),
            resource=EventResourceFilter(id=[f"prefect.flow-run.{run.id}"]),
        ),
        limit=1,
    ).events
    if not heard or run.state.type not in (StateType.RUNNING, StateType.CANCELLING):
        return state
    return Sign(heard[0].received, str(heard[0].id), heartbeat=True)


def mark_ended(client: SyncPrefectClient, run: FlowRun, why: str, by: str = "The reaper") -> bool:
    """Crashed, or Cancelled where that was under way; false where the run has ended meanwhile. Its task runs go too."""
    state = Cancelled if run.state_type == StateType.CANCELLING else Crashed
    try:
        # Not forced: of a run that has ended, the server refuses it.
        answer: OrchestrationResult[None] = client.set_flow_run_state(run.id, state(message=f"{by} found that {why}."))
    except ObjectNotFound:
        return False
    if answer.status != SetStateStatus.ACCEPT:
        return False
    of_it = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
    going = TaskRunFilter(
        state=TaskRunFilterState(type=TaskRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING]))
    )
    for found in client.read_task_runs(flow_run_filter=of_it, task_run_filter=going):
        client.set_task_run_state(found.id, Crashed(message="Its flow run's process is dead."), force=True)
    return True


def end_leftovers(client: SyncPrefectClient, crashed: set[UUID], settle_seconds: float) -> list[str]:
    """End MLflow runs that say RUNNING and whose flow run has ended, just now by us or some time ago.

    A flow run that this server does not know may be another server's: its MLflow runs are left alone.
    """
    settings, ended = read_settings(), []
    mlflow = runs.open_client(settings)
    with runs.named_errors(settings.mlflow_uri):
        for left in leftovers.still_open(mlflow):
            try:
                run = client.read_flow_run(UUID(left.flow_run))
            except (ObjectNotFound, ValueError):
                continue
            state = run.state
            if state is None or not state.is_final():
                continue
            if run.id not in crashed and datetime.now(UTC) - state.timestamp < timedelta(seconds=settle_seconds):
                continue  # its process may be about to end it
            killed = state.is_crashed() or state.is_cancelled()
            reason = f"flow run {run.name} ({run.id}) is {state.name}: {state.message or 'no reason given'}"
            leftovers.end(mlflow, left.run_id, "KILLED" if killed else "FAILED", reason)
            ended.append(left.run_id)
    return ended


def _under_way(client: SyncPrefectClient) -> list[FlowRun]:
    states = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    found: list[FlowRun] = []
    while True:
        page = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=FLOWS)),
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states))),
            limit=PAGE,
            offset=len(found),
        )
        found += page
        if len(page) < PAGE:
            return found


def _patience(run: FlowRun, sign: Sign, lease_seconds: float) -> float:
    """How long a run may be silent. Being Cancelling is no work: the lease is enough for it."""
    if sign.heartbeat or run.state_type == StateType.CANCELLING:
        return lease_seconds
    return UNHEARD_HOURS * 3600
