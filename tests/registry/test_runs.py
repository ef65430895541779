"""Runs in MLflow: what is shown of the server's address."""

from __future__ import annotations

import pytest
import requests
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, PERMISSION_DENIED, UNAUTHENTICATED

from modelpress.errors import ConfigError, SetupError
from modelpress.settings import Settings
from registry.runs import named_errors, open_client, right_to_edit, run_url, version_url


def test_the_page_of_a_run_is_shown_without_the_servers_login() -> None:
    """It stands in results, in Prefect and in what is printed."""
    settings = Settings.model_validate({"tracking_uri": "https://name:password@mlflow.example.org/base/"})
    assert run_url(settings, "r", "1") == "https://mlflow.example.org/base/#/experiments/1/runs/r"
    assert version_url(settings, "digits", "3") == "https://mlflow.example.org/base/#/models/digits/versions/3"


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg2", "mysql+pymysql", "mssql+pyodbc"])
def test_the_database_behind_a_server_is_no_server(scheme: str) -> None:
    """Neither its driver nor its password is needed to say so."""
    settings = Settings.model_validate({"tracking_uri": f"{scheme}://mlflow:a-password@db.example.org:5432/mlflow"})
    with pytest.raises(ConfigError, match=rf"found: {scheme.replace('+', '.')}://db\.example\.org") as refused:
        open_client(settings)
    assert "a-password" not in str(refused.value)
    assert "--backend-store-uri" in str(refused.value)


def refusal(status: int) -> requests.HTTPError:
    answer = requests.Response()
    answer.status_code = status
    return requests.HTTPError(f"{status} for http://someone:a-password@host/artifacts", response=answer)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MlflowException("Permission denied", PERMISSION_DENIED), "user 'anna' may not do this: Permission denied"),
        (refusal(403), r"the right to EDIT the experiment 'digits' and the registered model 'digits'"),
        (MlflowException("not authenticated", UNAUTHENTICATED), "set MLFLOW_TRACKING_USERNAME"),
        (refusal(401), "a user and a password that this server knows"),
        (MlflowException("broken", INTERNAL_ERROR), "a tracking server that answers"),
        (refusal(502), "a tracking server that answers"),
        (requests.ConnectionError("refused"), "a tracking server that answers"),
    ],
)
def test_a_refusal_is_told_from_a_server_that_is_down(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "anna")
    with (
        pytest.raises(SetupError, match=said) as named,
        named_errors("http://someone:a-password@host", right_to_edit("digits")),
    ):
        raise error
    assert "a-password" not in str(named.value)
