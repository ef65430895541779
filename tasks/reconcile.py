"""The tasks that bring MLflow's aliases and the pointers together."""

from __future__ import annotations

from collections.abc import Sequence

from mlflow import MlflowClient
from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from modelpress.settings import read_settings
from modelpress.store.base import Store, open_store
from registry import reconcile, runs
from registry.reconcile import Differing, Outcome
from tasks.progress import StageProgress


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
        found = reconcile.settle(store, client, name, alias, progress)
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


def _right(name: str | None) -> str:
    return f"the right to READ {f'the registered model {name!r}' if name else 'all registered models'}"
