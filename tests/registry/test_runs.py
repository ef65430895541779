"""Runs in MLflow: what is shown of the server's address."""

from __future__ import annotations

from pathlib import Path

import pytest
import requests
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, PERMISSION_DENIED, UNAUTHENTICATED

from modelpress.errors import ConfigError, SetupError
from modelpress.reports import PruneReport, PruneStep, TrainReport
from modelpress.settings import Settings
from registry.runs import Run, named_errors, open_client, right_to_edit, run_url, version_url
from tests.databases import Databases


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


def test_the_losses_of_gradual_pruning_are_one_curve(tmp_path: Path, databases: Databases) -> None:
    def trained(*losses: float) -> TrainReport:
        return TrainReport(
            epochs=len(losses), updates=1, first_loss=losses[0], final_loss=losses[-1], losses=list(losses)
        )

    steps = [
        PruneStep(sparsity=0.2, zeros=2, recovery=trained(3, 2)),
        PruneStep(sparsity=0.5, zeros=5, recovery=trained(1)),
    ]
    counts = dict.fromkeys(("eligible_parameters", "touched_parameters", "parameters_before", "parameters_after"), 10)
    report = PruneReport(method="magnitude", zeros_after=5, tensors=[], recovery=trained(1), steps=steps, **counts)
    client = open_client(Settings(home=tmp_path, tracking_uri=databases.mlflow(tmp_path)))
    experiment = client.create_experiment("curves")
    run = Run(client, client.create_run(experiment).info.run_id, experiment)
    run.series(report.series())
    history = client.get_metric_history(run.id, "recovery.loss")
    assert [(one.step, one.value) for one in history] == [(1, 3), (2, 2), (3, 1)]
