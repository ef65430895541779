"""The tasks that bring MLflow's aliases and the pointers together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlflow import MlflowClient
from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger

from modelpress.errors import SetupError
from modelpress.settings import read_settings
from modelpress.store.base import Store, open_store
from registry import gates, reconcile, runs
from registry.reconcile import Differing, Outcome
from tasks.progress import StageProgress

if TYPE_CHECKING:
    from registry.promotion import Judged

ASKS = "promote/promote"
"""The deployment whose runs wait for a person's answer."""


@task(name="look", task_run_name="look", cache_policy=NO_CACHE)
def look(name: str | None) -> list[Differing]:
    """The aliases that do not say what their pointers say."""
    store, client = opened()
    with runs.named_errors(client.tracking_uri, _right(name)):
        return reconcile.look(store, client, name)


@task(name="settle", task_run_name="settle-{name}-{alias}", cache_policy=NO_CACHE)
def settle(name: str, alias: str) -> Outcome:
    """Bring one alias and its pointer together: judge what a person asked for, or let the alias follow."""
    store, client = opened()
    with StageProgress("gate") as progress, runs.named_errors(client.tracking_uri, runs.right_to_edit(name)):
        found = reconcile.settle(store, client, name, alias, progress, _ask)
    level = "warning" if found.action in ("undone", "stuck") else "info"
    where = f"version {found.version}" if found.version else "no version"
    getattr(get_run_logger(), level)(
        "reconcile: %s@%s, set to %s: %s%s",
        *(name, alias, where, found.action, f": {found.why}" if found.why else ""),
        extra={"stage": "reconcile"},
    )
    return found


@task(name="show", task_run_name="show", cache_policy=NO_CACHE)
def show(found: Sequence[Outcome]) -> None:
    """What was done, as a table."""
    rows = [
        {
            "model": f"{one.name}@{one.alias}",
            "version": one.version,
            "what": one.action,
            "served": one.pack[:12],
            "why": one.why,
        }
        for one in found
    ]
    create_table_artifact(rows, key="reconciled", description="Aliases in MLflow and the pointers that servers follow")


def opened() -> tuple[Store, MlflowClient]:
    """The publication store and MLflow, which answers.

    Raises:
        SetupError: it does not.
    """
    settings = read_settings()
    runs.check_server(settings.mlflow_uri)
    return open_store(settings.store_uri, settings), runs.open_client(settings)


def _ask(judged: Judged) -> str:
    """Start the run that asks a person; one that waits for the same answer already is left to wait.

    Raises:
        SetupError: there is no deployment to run.
    """
    name, pack = judged.version.name, judged.version.pack
    parameters = {"name": name, "candidate": pack, "gate": judged.gate.model_dump(mode="json")}
    key = f"approve-{name}-{judged.gate.alias}-{gates.fingerprint(pack, judged.decision)}"
    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(ASKS)
        except ObjectNotFound as error:
            raise SetupError(
                f"asking for approval of {name} {pack}",
                found=f"no deployment {ASKS!r}",
                fix="deploy infra/prefect.yaml, or start the flow promote for it where somebody can answer",
            ) from error
        while True:
            # Named as the flow names itself when it begins: the description would keep a name that is no more.
            run = client.create_flow_run_from_deployment(
                deployment.id, parameters=parameters, idempotency_key=key, name=f"promote-{name}-{pack}"
            )
            if run.state is None or not run.state.is_final():
                break
            key = f"approve-after-{run.id}"  # the same numbers were answered before, and somebody clicked again
    return f"the run {run.name} asks for it in Prefect"


def _right(name: str | None) -> str:
    return f"the right to READ {f'the registered model {name!r}' if name else 'all registered models'}"
