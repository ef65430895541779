"""The line cut into jobs: some stages where a GPU is, the others where cores are cheap.

A pool decides on which machine, in which container and with which resources a run stands; so a job is a run of its own,
in a deployment of its own. Nothing is handed from job to job but the work store, which they must share: each job begins
with the line's first stage, and takes what others have recorded.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import cast

from prefect import Flow, State, flow, runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.logging import get_run_logger
from prefect.states import Cancelling
from prefect.utilities.urls import url_for
from pydantic import Field

from flows.line import tracked
from flows.optimize import optimize
from flows.result import OptimizeResult, StageRow
from flows.stages import check_part, run_stages
from modelpress.config import OptimizeConfig, Part
from modelpress.config.base import Config
from modelpress.errors import ConfigError, StageError
from tasks.packs import pin_bases
from tasks.restarts import on_crashed

ATTEMPTS = 100


class Job(Config):
    """A run of some stages in a place of their own."""

    last: Part
    """The stage that it ends with. It begins where the job before it ended."""
    deployment: str = Field(default="optimize-part/optimize-part-gpu", pattern=r"^[^/]+/[^/]+$")
    """FLOW/DEPLOYMENT of the flow `optimize-part`; its pool says where the job runs and with what."""


@flow(name="optimize-part", flow_run_name="optimize-{config.name}-to-{last}", on_crashed=[on_crashed])
def optimize_part(config: OptimizeConfig, last: Part) -> list[StageRow]:
    """Run the line up to one stage and record it; whoever shares the work store goes on from there.

    Args:
        config: The recipe of the whole line.
        last: The stage to end with.

    Raises:
        ConfigError: the recipe has no such stage.
        BudgetExceededError: a stage's quality is over budget.
    """
    check_part(config, last)
    with tracked(pin_bases(config)) as line:
        for stage, _ in run_stages(line, line.config):
            if stage == last:
                break
        return line.rows


def cancel_parts(flow: Flow[..., object], flow_run: FlowRun, state: State) -> None:  # noqa: ARG001
    """A flow's hook: where the whole is cancelled, its jobs are, on whatever machine they run."""
    with get_client(sync_client=True) as client:
        children = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[flow_run.id]))
        for child in client.read_flow_runs(flow_run_filter=children):
            if child.state is not None and not child.state.is_final():
                client.set_flow_run_state(child.id, Cancelling(message="the run that started it was cancelled"))


@flow(
    name="optimize-in-jobs",
    flow_run_name="optimize-{config.name}-in-jobs",
    on_cancellation=[cancel_parts],
    on_crashed=[on_crashed],
)
def optimize_in_jobs(config: OptimizeConfig, jobs: list[Job]) -> OptimizeResult:
    """The whole line, some of its stages as jobs of their own: on a GPU, in a container, on another machine.

    Started again, it waits for a job that is still under way, and repeats none that has ended well.

    Args:
        config: The recipe.
        jobs: In the order of the line. What comes behind the last one runs in this run itself.

    Raises:
        ConfigError: jobs that are out of order, or end with a stage that the recipe leaves out.
        StageError: a job did not end well.
    """
    check_jobs(config, jobs)
    config = pin_bases(config)  # once, for all jobs
    for job in jobs:
        _finish(config, job)
    return optimize(config)


def check_jobs(config: OptimizeConfig, jobs: list[Job]) -> None:
    """Refuse jobs that don't follow the line.

    Raises:
        ConfigError: see `optimize_in_jobs`.
    """
    for job in jobs:
        check_part(config, job.last)
    order, asked = config.parts, [job.last for job in jobs]
    if asked != sorted(set(asked), key=order.index):
        raise ConfigError(
            "ordering the jobs", found=f"they end with {', '.join(asked)}", expected=f"the order {', '.join(order)}"
        )


def _finish(config: OptimizeConfig, job: Job) -> None:
    """Start a job, or find the one that an earlier start of this run left, and wait for its end."""
    began = datetime.now(UTC)
    parameters = {"config": config.model_dump(mode="json"), "last": job.last}
    for attempt in range(ATTEMPTS):
        key = f"{runtime.flow_run.id}-{job.last}-{attempt}"
        found = run_deployment(job.deployment, parameters=parameters, idempotency_key=key, poll_interval=2)
        run = cast(FlowRun, found)  # a coroutine in async flows alone
        state = run.state
        if state is not None and state.is_completed():
            get_run_logger().info("%s: done by %s", job.last, run.name, extra={"stage": job.last})
            return
        if run.created is None or run.created >= began:
            break  # not one of an earlier start
    url = url_for("flow-run", obj_id=run.id)
    raise StageError(
        f"running the stages up to {job.last} in {job.deployment}",
        found=f"flow run {run.name} is {state.name if state else 'gone'}: {(state and state.message) or 'no message'}",
        fix=f"look at {url or run.id}; when it is mended, retry this run: what is recorded is taken",
    )
