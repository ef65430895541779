"""Telling MLflow where its events go, once and again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.webhook import Webhook
from mlflow.exceptions import MlflowException

from flows.hooks.app import ACTIONS, ENTITY
from modelpress.errors import SetupError
from modelpress.settings import Settings, without_logins
from registry import runs

NAME = "modelpress"
EVENTS: list[Any] = [f"{ENTITY}.{action}" for action in ACTIONS]


@dataclass(frozen=True)
class Registered:
    """The webhook as MLflow has it."""

    id: str
    made: bool
    """False: it was there, and says now what it should."""


def connect(settings: Settings) -> MlflowClient:
    """MLflow, which answers.

    Raises:
        SetupError: it does not.
    """
    runs.check_server(settings.mlflow_uri)
    return runs.open_client(settings)


def register(client: MlflowClient, url: str, secret: bytes, *, test: bool = True) -> Registered:
    """Make the webhook, or bring the one of our name up to date, and let MLflow try it.

    Args:
        client: MLflow, logged in as an administrator where it has logins.
        url: of the receiver, as MLflow reaches it; `/mlflow` at its end.
        secret: what MLflow signs with.
        test: let MLflow send an event about a model that is not there.

    Raises:
        SetupError: MLflow refuses it, or can't reach it.
    """
    text, about = secret.decode(), "modelpress looks where an alias was set or deleted."
    doing = f"registering the webhook {without_logins(url)} in MLflow"
    try:
        ours = [hook for hook in _all(client) if hook.name == NAME]
        if ours:
            hook = client.update_webhook(
                ours[0].webhook_id, url=url, events=EVENTS, secret=text, status="ACTIVE", description=about
            )
            for double in ours[1:]:  # two first registrations at the same time
                client.delete_webhook(double.webhook_id)
        else:
            hook = client.create_webhook(NAME, url, EVENTS, description=about, secret=text)
        tried = client.test_webhook(hook.webhook_id) if test else None
    except MlflowException as error:
        raise _refused(doing, str(error).partition("\n")[0][:500]) from error
    if tried is not None and not tried.success:
        found = tried.error_message or f"status {tried.response_status}: {tried.response_body}"
        raise _refused(doing, f"it is registered, but a trial failed: {found[:500]}")
    return Registered(hook.webhook_id, not ours)


def _all(client: MlflowClient) -> Iterator[Webhook]:
    token: str | None = None
    while True:
        page = client.list_webhooks(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _refused(doing: str, found: str) -> SetupError:
    return SetupError(
        doing,
        found=found,
        expected="MLflow to take it, and to reach the receiver with the secret that the receiver has",
        fix="give MLflow's server MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY; for an address that is not https, "
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES=https,http; for one that is not public, MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS=true; "
        "log in as an administrator; see docs/operations.md, Triggers",
    )
