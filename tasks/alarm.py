"""What is told of a scheduled run that failed."""

from __future__ import annotations

import asyncio
import inspect
from itertools import takewhile
from uuid import UUID

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.core import Block
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.logging import get_run_logger
from prefect.utilities.urls import url_for

from modelpress.errors import ConfigError
from modelpress.reports import Report

LOOKED_BACK = 200
"""Ended runs of the same deployment that are counted at most."""
ENDED = [StateType.COMPLETED, StateType.FAILED, StateType.CRASHED]


class Failure(Report):
    """A run that failed, and how long that has gone on."""

    deployment: str
    """Name of the deployment."""
    run: str
    """Name of the flow run."""
    url: str
    """Its page; empty where Prefect has no UI."""
    state: str
    """`Failed`, `Crashed`, `TimedOut`."""
    message: str
    """What the run said last."""
    in_a_row: int
    """Runs of this deployment that failed since one was completed, this one included."""

    @property
    def subject(self) -> str:
        """In one line."""
        return f"{self.deployment}: {self.state}, {self.in_a_row} in a row"

    @property
    def told(self) -> bool:
        """Whether somebody is told: at the first failure, and whenever the row has doubled."""
        return self.in_a_row & (self.in_a_row - 1) == 0


@task(name="record", task_run_name="record", cache_policy=NO_CACHE)
def record(flow_run_id: UUID) -> Failure:
    """Read what became of a run, and write a page of it; the page of each deployment keeps its history."""
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(flow_run_id)
        name, before = "no deployment", []
        if run.deployment_id is not None:
            name = client.read_deployment(run.deployment_id).name
            before = client.read_flow_runs(
                flow_run_filter=FlowRunFilter(
                    deployment_id=FlowRunFilterDeploymentId(any_=[run.deployment_id]),
                    state=FlowRunFilterState(type=FlowRunFilterStateType(any_=ENDED)),
                ),
                sort=FlowRunSort.END_TIME_DESC,
                limit=LOOKED_BACK,
            )
    row = len(list(takewhile(lambda one: one.state_type is not StateType.COMPLETED, before)))
    found = Failure(
        deployment=name,
        run=run.name,
        url=url_for("flow-run", obj_id=run.id) or "",
        state=(run.state.name or "") if run.state else "",
        message=((run.state.message or "") if run.state else "")[:2000],
        in_a_row=max(row, 1),
    )
    link = f"[{found.run}]({found.url})" if found.url else found.run
    text = f"# {found.subject}\n\nRun {link} said:\n\n```\n{found.message}\n```\n"
    create_markdown_artifact(text, key=f"failed-{name.replace('_', '-').lower()}", description=found.subject)
    get_run_logger().error("alarm: %s: %s", found.subject, found.message, extra={"stage": "alarm"})
    return found


@task(name="notify", task_run_name="notify", cache_policy=NO_CACHE)
def notify(block: str, found: Failure) -> None:
    """Send it through a notification block of Prefect's, which holds the address and its secret.

    Raises:
        ConfigError: there is no such block, or it sends nothing.
    """
    doing = f"notifying through the block {block!r}"
    fix = "make it in Prefect's UI (Blocks), and name it as TYPE/NAME, such as slack-webhook/ops"
    try:
        sender = Block.load(block)
    except ValueError as error:
        raise ConfigError(doing, found=str(error)[:300], expected="a notification block", fix=fix) from error
    if not isinstance(sender, NotificationBlock):
        raise ConfigError(doing, found=f"a {type(sender).__name__}", expected="a notification block", fix=fix)
    sent = sender.notify(body=f"{found.message}\n{found.url}", subject=found.subject)
    if inspect.iscoroutine(sent):  # blocks that ship with Prefect have sent it by now; others may leave that to us
        asyncio.run(sent)
