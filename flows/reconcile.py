"""What people set in MLflow by hand reaches the pointers, by the gate; what does not pass goes back."""

from __future__ import annotations

from prefect import flow

from modelpress.config import PackName
from modelpress.errors import ModelpressError, StageError
from registry.reconcile import Outcome
from tasks import reconcile as tasks


@flow(name="reconcile", flow_run_name="reconcile")
def reconcile(name: PackName | None = None) -> list[Outcome]:
    """Compare MLflow's aliases with the pointers that servers follow, and settle what differs.

    An alias that a person set is judged by the pack's own gate: a pass moves the pointer; else the alias goes back, and
    the model version says why. Where the gate asks for approval, the alias goes back too, and a run of the deployment
    `promote` asks a person. An alias that lags behind its pointer, or was deleted, is set to what is served. Where
    nothing differs, nothing is done and no weight is read.

    Args:
        name: Name of one registered model; left out, all are looked at.

    Raises:
        StageError: some could not be settled; the others are.
    """
    settled, failed = [], []
    for one in tasks.look(name):
        try:
            settled.append(tasks.settle(one.name, one.alias))
        except ModelpressError as error:
            failed.append(f"{one.name}@{one.alias}: {error.doing}: {error.found}")
    if settled:
        tasks.show(settled)
    if failed:
        raise StageError(
            "reconciling aliases with their pointers",
            found="; ".join(failed),
            fix="mend what is named; the next look tries again, and servers follow the pointers as they stand",
        )
    return settled
