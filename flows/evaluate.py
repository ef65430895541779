"""Measure again what an alias points at: the published bytes, on held-out data."""

from __future__ import annotations

from prefect import flow

from flows.line import flow_run_tags
from flows.watch import watched
from modelpress.config import Alias, GateConfig, PackName
from modelpress.errors import GateError
from tasks import recheck, release
from tasks.recheck import Rechecked


@flow(name="evaluate-published", flow_run_name="evaluate-{name}-{alias}")
def evaluate_published(name: PackName, alias: Alias = "champion", gate: GateConfig | None = None) -> Rechecked:
    """Download what an alias points at, verify it, measure it on held-out data, and fail where it is no longer good.

    The numbers stand in MLflow, in a run of their own and on the model version, whatever the verdict. The alias stays
    where it is: going back is for a person to decide.

    Args:
        name: Name of the pack and of the registered model.
        alias: The alias whose pack is measured.
        gate: The conditions; left out, the ones in the pack's own config.

    Raises:
        GateError: its quality left the gate's bound, or the samples are too few to tell.
        CorruptionError: the published bytes are not what the manifest says.
    """
    with watched(name):
        found = recheck.recheck(name, alias, release.find_pack(name, alias), gate, flow_run_tags())
        recheck.show(found)
    if not found.decision.promote:
        raise GateError(
            f"measuring {name}@{alias} again, pack {found.pack}",
            found="; ".join(found.decision.reasons),
            expected="every check to pass, as when it was promoted",
            fix=f"look at {found.mlflow_url}; where the data is right, go back with the deployment `rollback`, and "
            "where a check is inconclusive, bring more evaluation samples",
        )
    return found
