"""Whether a flow run shall go on: one whose process died, where its deployment asks; one that was cancelled, not.

The tag `restarts:2` on a deployment, or on one run, lets its runs start again so often. The same flow run goes on, as
after a click on Retry: stages that are recorded are taken, and a training goes on. A run that failed with an error is
not started again: the error would come again.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID

import httpx
from prefect import Flow, runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import OrchestrationResult, SetStateStatus
from prefect.logging import get_logger
from prefect.logging.loggers import flow_run_logger
from prefect.states import AwaitingRetry

from modelpress.errors import StageError

log = get_logger("modelpress.restarts")

TAG = "restarts:"
MOST = 20
SETTLED = timedelta(seconds=10)
"""How long a run must have been Crashed: a worker reports it up to a few seconds after the runner did."""
SETTLE_SECONDS, SETTLE_LOOKS = 1.0, 60
LATELY = timedelta(days=1)
"""How old a death may be that the reaper makes up for."""


def asked(tags: list[str]) -> int:
    """How often a run with these tags may start again; an illegal number counts as none, and is told."""
    found = [tag.removeprefix(TAG).strip() for tag in tags if tag.startswith(TAG)]
    if not found:
        return 0
    if len(found) > 1 or not re.fullmatch(r"[0-9]{1,2}", found[0]) or int(found[0]) > MOST:
        log.error("tags %s: expected one tag %sN, N from 0 to %d; the run is not started again", tags, TAG, MOST)
        return 0
    return int(found[0])


def start_again(client: SyncPrefectClient, run_id: UUID) -> bool:
    """Schedule a crashed run again, if it may; whether it was."""
    run = client.read_flow_run(run_id)
    allowed = asked(run.tags)
    if run.state is None or not run.state.is_crashed() or run.deployment_id is None or run.run_count > allowed:
        return False
    message = f"Start {run.run_count + 1} of at most {allowed + 1}, as the process died: {run.state.message}"
    answer: OrchestrationResult[None] = client.set_flow_run_state(run_id, AwaitingRetry(message=message))
    return answer.status == SetStateStatus.ACCEPT


def on_crashed(flow: Flow[..., object], flow_run: FlowRun, state: State) -> None:  # noqa: ARG001
    """A flow's hook: Prefect calls it where a worker, or the engine, saw the process die. The reaper does for runs
    that nobody saw.

    A worker reports the death once more when this returns, and would take back what was scheduled by then: so a process
    of its own waits for that. It holds none of the worker's pipes, at whose end the worker waits, and tells the run's
    page what it does.
    """
    if asked(flow_run.tags):
        command = [sys.executable, "-m", "tasks.restarts", str(flow_run.id)]
        nowhere = subprocess.DEVNULL
        subprocess.Popen(command, start_new_session=True, stdin=nowhere, stdout=nowhere, stderr=nowhere)


def start_settled(client: SyncPrefectClient, run_id: UUID, sleep: Callable[[float], None] = time.sleep) -> bool:
    """Schedule a crashed run again as soon as its state has stood for a while from now on; whether it was."""
    begun = datetime.now(UTC)
    for _ in range(SETTLE_LOOKS):
        run = client.read_flow_run(run_id)
        if run.state is None or not run.state.is_crashed():
            return False  # somebody was quicker, or it has another end
        if datetime.now(UTC) - max(begun, run.state.timestamp) > SETTLED:
            return start_again(client, run_id)
        sleep(SETTLE_SECONDS)
    return False


def crashed_and_waiting(client: SyncPrefectClient, flows: list[str]) -> list[FlowRun]:
    """Crashed runs of some flows that may start again and that nobody started: the reaper's to do."""
    crashed = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CRASHED]))
    lately = FlowRunFilterEndTime(after_=datetime.now(UTC) - LATELY)
    found = client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=flows)),
        flow_run_filter=FlowRunFilter(state=crashed, end_time=lately),
        limit=200,
    )
    now = datetime.now(UTC)
    return [
        run
        for run in found
        if run.state is not None and now - run.state.timestamp > 6 * SETTLED and run.run_count <= asked(run.tags)
    ]


def check_wanted() -> None:
    """Refuse to go on where the present flow run was cancelled: its worker, which would have stopped it, may be dead.

    A server that does not answer stops no run: a worker that lives would have.

    Raises:
        StageError: it was.
    """
    try:
        with get_client(sync_client=True) as client:
            run = client.read_flow_run(UUID(str(runtime.flow_run.id)))
    except httpx.TransportError as error:
        log.warning("whether the run was cancelled can't be asked, as Prefect's server does not answer: %s", error)
        return
    if run.state is not None and (run.state.is_cancelling() or run.state.is_cancelled()):
        raise StageError(
            f"going on with flow run {run.name}",
            found=f"it is {run.state.name}, and no worker stopped it",
            fix="nothing was published; start the run again if it is wanted",
        )


def main(run_id: UUID) -> None:
    """The process that a hook leaves behind."""
    with get_client(sync_client=True) as client:
        told = flow_run_logger(client.read_flow_run(run_id))
        try:
            if start_settled(client, run_id):
                told.info("the run's process died; it was scheduled to go on")
        except httpx.HTTPError as error:
            told.error("the run's process died; the reaper will schedule it, as this failed: %s", error)


if __name__ == "__main__":
    main(UUID(sys.argv[1]))
