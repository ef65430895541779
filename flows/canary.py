"""A candidate takes over step by step: begun after the gate, looked at each minute, ended by the tests."""

from __future__ import annotations

from prefect import flow
from prefect.settings import PREFECT_API_URL

from flows.approval import ask
from flows.watch import watched
from modelpress.config import CanaryConfig, GateConfig, PackName
from modelpress.errors import GateError, ModelpressError, StageError
from registry import gates
from registry.canaries import Looked
from registry.gates import Decision
from tasks import canary as steps
from tasks import release


@flow(name="promote-canary", flow_run_name="promote-canary-{name}-{candidate}")
def promote_canary(
    name: PackName,
    candidate: str = "challenger",
    canary: CanaryConfig = CanaryConfig(),  # noqa: B008  frozen
    gate: GateConfig | None = None,
) -> Decision:
    """Judge a published pack on its own bytes and, if it is no worse, let it take over step by step.

    The deployment `canary` does the steps. Where the gate asks for approval, the run waits for a person's answer before
    the first request goes to the candidate.

    Args:
        name: Name of the pack and of the registered model.
        candidate: What is judged: an alias, a model version's number, or a pack's digest.
        canary: Steps, bounds and error rates.
        gate: The conditions; left out, the ones in the pack's own config.

    Raises:
        GateError: the gate refused; no request goes to the candidate.
    """
    with watched(name):
        pack = release.find_pack(name, candidate)

        decision = steps.start(name, pack, canary, gate)
        while gates.waits(decision) and PREFECT_API_URL.value():
            decision = steps.start(name, pack, canary, gate, ask(name, pack, decision))
    if not decision.promote:
        raise GateError(
            f"beginning a canary of {name} with pack {pack}",
            found="; ".join(decision.reasons),
            expected="every check to pass",
            fix="the champion answers all requests; better the candidate, or bring more evaluation samples where the "
            "gate is inconclusive",
        )
    return decision


@flow(name="canary", flow_run_name="canary")
def canary(name: PackName | None = None) -> list[Looked]:
    """Look at every canary that runs, and do the next thing: wait, step, promote or roll back.

    Args:
        name: Name of one pack; left out, all are looked at.

    Raises:
        StageError: some could not be looked at; the others were.
    """
    looked, failed = [], []
    for pack, alias in steps.find(name):
        try:
            found = steps.look(pack, alias)
        except ModelpressError as error:
            failed.append(f"{pack}@{alias}: {error.doing}: {error.found}")
        else:
            looked += [found] if found is not None else []
    if looked:
        steps.show(looked)
    if failed:
        raise StageError(
            "looking at canaries",
            found="; ".join(failed),
            fix="mend what is named; the next look tries again, and servers stop what is clear to them by themselves",
        )
    return looked
