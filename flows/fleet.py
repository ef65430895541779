"""The model registry for the page of all models: what the settings name, read once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from modelpress.errors import SetupError
from modelpress.page.registry import Registry
from modelpress.settings import Settings, without_logins
from registry import fleet, runs

LOCAL = "sqlite:///"


def registered(settings: Settings, names: Sequence[str] = ()) -> Registry:
    """What the registry of the settings says, of these models or of all.

    Raises:
        SetupError: MLflow does not answer, refuses, or there is no local database.
        ConfigError: the settings name the database behind an MLflow server.
    """
    uri = settings.mlflow_uri
    if uri.startswith(LOCAL) and not Path(uri.removeprefix(LOCAL)).is_file():  # else it would be made, and be empty
        raise SetupError(
            "reading the model registry",
            found=f"no database {uri.removeprefix(LOCAL)}",
            expected="an MLflow server, or the database of runs on this machine",
            fix="set MODELPRESS_TRACKING_URI to the server, or run a recipe here first",
        )
    runs.check_server(uri)
    with runs.named_errors(uri, "the right to READ registered models"):
        return fleet.read(runs.open_client(settings), without_logins(uri), names)
