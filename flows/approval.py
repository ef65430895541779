"""A person's yes before a promotion: the run waits in Prefect, and is answered by a form in its UI.

A deployed run is *suspended*: its process ends, and with it the worker's slot, the memory and the deployment's place
are free for the day that an answer may take; a worker's death loses nothing. The answer starts the flow again, which
judges afresh (bytes may have been damaged, the champion may be another) and takes what was finished from its records.
An answer holds for the decision that was shown: with other numbers the person is asked again. A run without a
deployment can't be started again by anybody, so it is *paused*: its process waits.
"""

from __future__ import annotations

from datetime import UTC, datetime

from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run, suspend_flow_run
from prefect.input import RunInput
from prefect.logging import get_run_logger
from prefect.runtime import deployment, flow_run
from prefect.settings import PREFECT_API_URL
from pydantic import Field

from modelpress.config import GateConfig
from modelpress.reports import Override
from registry import gates
from registry.gates import Approval, Decision
from tasks import release

POLL_SECONDS = 5
"""How often a paused process looks for the answer."""


class Answer(RunInput):
    """The form."""

    approve: bool = Field(default=False, description="On: the pointer moves, and servers load the pack within seconds.")
    name: str = Field(min_length=1, max_length=100, description="Who answers; it is kept in the pointer's log.")
    reason: str = Field(min_length=1, max_length=1000, description="Why; it is kept as well.")


def approved(
    name: str,
    pack: str,
    gate: GateConfig | None,
    decision: Decision,
    override: Override | None = None,
    *,
    move: bool = True,
) -> Decision:
    """The decision, with a person's answer where nothing else is missing.

    Args:
        name: of the pack and of the registered model.
        pack: digest of the candidate.
        gate: what it was judged by; None: the pack's own.
        decision: of the gate.
        override: what a person said against it, to be judged with again.
        move: whether the alias moves then.

    Returns:
        A decision that waits for nobody, unless there is no server where anybody could answer.
    """
    while gates.waits(decision) and PREFECT_API_URL.value():
        decision = release.promote(name, pack, gate, ask(name, pack, decision), override, move)
    return decision


def ask(name: str, pack: str, decision: Decision) -> Approval:
    """Wait for the answer to one decision."""
    shown, hours = gates.fingerprint(pack, decision), decision.wait_hours or 0.0
    form, seconds = Answer.with_initial_data(description=describe(name, pack, decision)), int(hours * 3600)
    key = f"approve-{shown}"
    get_run_logger().info("gate: waits for a person, at most %g hours", hours, extra={"stage": "gate"})
    try:
        if deployment.id and not flow_run.parent_flow_run_id:
            answer = suspend_flow_run(wait_for_input=form, timeout=seconds, key=key)
        else:
            answer = pause_flow_run(wait_for_input=form, timeout=seconds, poll_interval=POLL_SECONDS, key=key)
    except FlowPauseTimeout:
        return Approval(approved=False, by="nobody", reason=f"no answer in {hours:g} hours", at=_now(), of=shown)
    return Approval(approved=answer.approve, by=answer.name, reason=answer.reason, at=_now(), of=shown)


def describe(name: str, pack: str, decision: Decision) -> str:
    """What the form shows above its fields, as markdown."""
    rows = [f"| {check.name} | {check.verdict} | {_cell(check.reason)} |" for check in decision.checks]
    head = f"Shall pack `{pack}` of **{name}** be served?"
    against = ["", f"The gate is {_cell(decision.override.line())}"] if decision.override else []
    return "\n".join([head, *against, "", "| check | verdict | numbers |", "|---|---|---|", *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
