"""MLflow as in production: on PostgreSQL and S3, a login for everybody, and rights that end where others' begin."""

from __future__ import annotations

from collections.abc import Iterator

import mlflow.pyfunc
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from flows.optimize import OptimizeResult, optimize
from modelpress.config import OptimizeConfig
from modelpress.errors import SetupError
from modelpress.store import open_store
from tests.conftest import S3Server
from tests.integration import postgres
from tests.integration.conftest import MlflowLogins
from tests.integration.small_workloads import CLASSES, WIDTH
from tests.integration.test_bad_input import NAME, RECIPE

CONFIG = OptimizeConfig.model_validate(RECIPE)
pytestmark = pytest.mark.s3


@pytest.fixture(scope="module")
def logins(
    mlflow_with_logins: MlflowLogins, prefect_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MlflowLogins]:
    """The server; a flow has a login to it and no key to its bucket."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELPRESS_HOME", str(tmp_path_factory.mktemp("logins")))
        patch.setenv("MODELPRESS_TRACKING_URI", mlflow_with_logins.uri)
        patch.setenv("MLFLOW_TRACKING_URI", mlflow_with_logins.uri)
        for name in ("MODELPRESS_STORE", "MODELPRESS_WORK", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name, raising=False)
        yield mlflow_with_logins


@pytest.fixture
def as_farm(logins: MlflowLogins, monkeypatch: pytest.MonkeyPatch) -> None:
    logins.log_in(monkeypatch, "farm")


@pytest.fixture(scope="module")
def done(logins: MlflowLogins) -> OptimizeResult:
    with pytest.MonkeyPatch.context() as patch:
        logins.log_in(patch, "farm")
        return optimize(CONFIG)


def test_the_database_is_postgresql(logins: MlflowLogins) -> None:
    """The other tests here also run without it, on SQLite."""
    if reason := postgres.lacking():
        pytest.skip(reason)
    assert logins.database.startswith("postgresql://")


def test_a_flow_records_with_its_login_alone(
    done: OptimizeResult, logins: MlflowLogins, as_farm: None, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient()
    run = client.get_run(done.mlflow_run)
    assert run.info.status == "FINISHED"
    assert {"config.json", "report.md"} <= {entry.path for entry in client.list_artifacts(done.mlflow_run)}
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    assert model.predict({"input": np.zeros((2, WIDTH), np.float32)})["output"].shape == (2, CLASSES)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    kept = {info.key for info in open_store(logins.artifacts, s3_server.settings()).list()}
    assert any(key.endswith(f"{done.mlflow_run}/artifacts/report.md") for key in kept)
    assert any(key.endswith("artifacts/pack.py") for key in kept)


def test_who_may_not_write_is_told_whom_to_ask(
    done: OptimizeResult, logins: MlflowLogins, monkeypatch: pytest.MonkeyPatch
) -> None:
    logins.log_in(monkeypatch, "guest")
    with pytest.raises(SetupError) as refused:
        optimize(CONFIG)
    said = str(refused.value)
    assert "user 'guest' may not do this" in said
    assert f"EDIT the experiment '{NAME}' and the registered model '{NAME}'" in said
    assert "docs/operations.md" in said
    assert logins.passwords["guest"] not in said
    with pytest.raises(MlflowException, match="Permission denied"):
        MlflowClient().set_registered_model_alias(NAME, "champion", done.version)
    assert mlflow.pyfunc.load_model(f"models:/{NAME}@champion").metadata.metadata["pack"] == done.pack


@pytest.mark.e2e
def test_what_was_granted_may_be_written(
    done: OptimizeResult, logins: MlflowLogins, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/operations.md says."""
    logins.log_in(monkeypatch, "colleague")
    experiment = MlflowClient().get_run(done.mlflow_run).info.experiment_id
    logins.grant("colleague", "experiment", experiment)
    logins.grant("colleague", "registered_model", NAME)
    again = optimize(CONFIG)
    assert (again.pack, again.version, again.recomputed) == (done.pack, done.version, [])


def test_a_wrong_password_is_no_dead_server(
    done: OptimizeResult, logins: MlflowLogins, monkeypatch: pytest.MonkeyPatch
) -> None:
    logins.log_in(monkeypatch, "farm")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another password")
    with pytest.raises(SetupError, match=r"user and a password(.|\n)*MLFLOW_TRACKING_USERNAME") as refused:
        optimize(CONFIG)
    assert "another password" not in str(refused.value)
