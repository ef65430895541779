"""Judge a published pack and move the alias; and the way back."""

from __future__ import annotations

from prefect import flow

from flows.approval import approved
from flows.watch import watched
from modelpress.config import Alias, GateConfig, PackName
from modelpress.errors import GateError
from modelpress.reports import Override
from registry.gates import Decision
from tasks import release


@flow(name="promote", flow_run_name="promote-{name}-{candidate}")
def promote(
    name: PackName,
    candidate: str = "challenger",
    gate: GateConfig | None = None,
    override: Override | None = None,
    move: bool = True,
) -> Decision:
    """Judge a published pack on its own bytes, and make it champion if it is no worse.

    Where the gate asks for approval, the run waits for a person's answer.

    Args:
        name: Name of the pack and of the registered model.
        candidate: What is judged: an alias, a model version's number, or a pack's digest.
        gate: The conditions; left out, the ones in the pack's own config.
        override: Who promotes it although it does not pass, and why: kept in the decision, the pointer's log, MLflow.
        move: Move the alias if it passes. Off: the decision is kept, for who moves it later.

    Raises:
        GateError: the gate refused; the champion is who it was.
    """
    with watched(name):
        pack = release.find_pack(name, candidate)
        decision = release.promote(name, pack, gate, override=override, move=move)
        decision = approved(name, pack, gate, decision, override, move=move)
    if not decision.promote:
        raise GateError(
            f"promoting {name} {pack}",
            found="; ".join(decision.reasons),
            expected="every check to pass",
            fix="the champion is unchanged; better the candidate, or bring more evaluation samples where the gate is "
            f"inconclusive (`modelpress decisions {name}` shows it again; docs/gate.md says how a person overrides it)",
        )
    return decision


@flow(name="rollback", flow_run_name="rollback-{name}-{alias}")
def rollback(name: PackName, alias: Alias = "champion", to: str | None = None) -> str:
    """Point an alias back at an earlier pack, and return that pack's digest.

    Args:
        name: Name of the pack and of the registered model.
        alias: The alias that goes back.
        to: Digest of the pack to return to; left out, the one that stood before the current one.
    """
    with watched(name):
        return release.rollback(name, alias, to)
