"""MLflow runs: one parent per flow run, one child per stage.

Only `MlflowClient` is used: the fluent API keeps its state in globals. Each run costs a handful of calls, whatever the
number of metrics.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import requests  # MLflow's own client: some of its errors come through bare
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH

from modelpress.errors import ConfigError, SetupError
from modelpress.settings import Settings, is_shared_database, without_logins
from registry import datasets

DEFAULT_UI = "http://127.0.0.1:5000"
"""Where `mlflow ui` shows a local database when nobody says otherwise."""
MAX_TAG_LENGTH = 5000
HEALTH_SECONDS = 5.0
SYSTEM_METRICS_INTERVAL_SECONDS = 2.0
"""Between samples; MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL overrides it."""


@dataclass(frozen=True)
class Run:
    """One MLflow run that is open for logging."""

    client: MlflowClient
    id: str
    experiment_id: str

    def params(self, values: Mapping[str, Any]) -> None:
        """Log a nested mapping as flat parameters; long values are cut (the whole config is an artifact)."""
        flat = [Param(key, text[:MAX_PARAM_VAL_LENGTH]) for key, text in flatten(values).items()]
        for start in range(0, len(flat), MAX_PARAMS_TAGS_PER_BATCH):
            self.client.log_batch(self.id, params=flat[start : start + MAX_PARAMS_TAGS_PER_BATCH])

    def metrics(self, values: Mapping[str, float]) -> None:
        """Log flat numbers in one call."""
        now = int(time.time() * 1000)
        self.client.log_batch(self.id, metrics=[Metric(key, value, now, 0) for key, value in values.items()])

    def series(self, values: Mapping[str, Sequence[float]]) -> None:
        """Log numbers by step, counted from 1."""
        now = int(time.time() * 1000)
        flat = [Metric(key, value, now, step) for key, found in values.items() for step, value in enumerate(found, 1)]
        self.client.log_batch(self.id, metrics=flat)  # in as many calls as MLflow takes

    def tag(self, key: str, value: str) -> None:
        """Set one tag."""
        self.client.set_tag(self.id, key, value)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags in one call; long texts are cut."""
        self.client.log_batch(self.id, tags=[RunTag(key, value[:MAX_TAG_LENGTH]) for key, value in values.items()])

    def json(self, name: str, value: Mapping[str, Any]) -> None:
        """Store a JSON artifact."""
        self.client.log_dict(self.id, dict(value), name)

    def table(self, name: str, rows: Sequence[Mapping[str, str]]) -> None:
        """Store rows that have the same keys as a table that MLflow's page shows; the name ends in .json."""
        self.client.log_table(self.id, {head: [row[head] for row in rows] for head in rows[0]}, name)

    def folder(self, path: Path) -> None:
        """Store every file of a folder as an artifact."""
        self.client.log_artifacts(self.id, str(path))


def open_client(settings: Settings) -> MlflowClient:
    """A client of the tracking and registry server that the settings name.

    Raises:
        ConfigError: they name the database behind one.
    """
    if is_shared_database(settings.mlflow_uri):
        raise ConfigError(
            "reading MODELPRESS_TRACKING_URI",
            found=f"{without_logins(settings.mlflow_uri)}, a database",
            expected="an MLflow server (https://…), or a local database (sqlite:///…)",
            fix="start `mlflow server` with it as --backend-store-uri, and name the server's address: without one "
            "there are no logins, and artifacts would stay on this machine's disk",
        )
    if settings.mlflow_uri.startswith("sqlite:///"):
        Path(settings.mlflow_uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=settings.mlflow_uri, registry_uri=settings.mlflow_uri)


def check_server(uri: str) -> None:
    """See in seconds that an MLflow server answers: its own client asks a dead one for minutes.

    Raises:
        SetupError: it does not.
    """
    if not uri.startswith(("http://", "https://")):
        return
    try:
        answer = httpx.get(f"{uri.rstrip('/')}/health", timeout=HEALTH_SECONDS, follow_redirects=True)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _unreachable(uri, str(error)) from error
    if answer.status_code >= 500:
        raise _unreachable(uri, f"status {answer.status_code}")


@contextmanager
def named_errors(uri: str, right: str = "the right to do this") -> Iterator[None]:
    """What MLflow or the way to it refuses in this block becomes a `SetupError` with the address.

    `right` is what a user must have where the server has logins; see `right_to_edit`.
    """
    try:
        yield
    except (MlflowException, requests.RequestException) as error:
        status, found = _status(error), str(error)[:1000]
        if status == 401:
            raise _unknown_user(uri, found) from error
        if status == 403:
            raise _forbidden(uri, found, right) from error
        raise _unreachable(uri, found) from error


def right_to_edit(name: str) -> str:
    """The right that a run of the line needs, and a promotion."""
    return f"the right to EDIT the experiment {name!r} and the registered model {name!r}"


def _status(error: MlflowException | requests.RequestException) -> int | None:
    """The HTTP status that a refusal came with, or would have come with."""
    if isinstance(error, MlflowException):
        return int(error.get_http_status_code())  # type: ignore[no-untyped-call]
    return error.response.status_code if error.response is not None else None


def _unreachable(uri: str, found: str) -> SetupError:
    return _error(
        uri,
        found,
        expected="a tracking server that answers",
        fix="start it (mlflow server), mend MODELPRESS_TRACKING_URI, or unset it to keep runs in a local database; "
        "`modelpress doctor` looks at it",
    )


def _unknown_user(uri: str, found: str) -> SetupError:
    return _error(
        uri,
        found,
        expected="a user and a password that this server knows",
        fix="set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN) where the flow runs",
    )


def _forbidden(uri: str, found: str, right: str) -> SetupError:
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    return _error(
        uri,
        f"{f'user {user!r}' if user else 'the user'} may not do this: {found}",
        expected=f"a user with {right}",
        fix="let an administrator, or who made it, grant that (docs/operations.md, MLflow); log in as another user "
        "(MLFLOW_TRACKING_USERNAME); or give the recipe a name of its own",
    )


def _error(uri: str, found: str, *, expected: str, fix: str) -> SetupError:
    secret = re.search("//([^/@]*@)", uri)  # a user and a password
    private = secret[1] if secret else ""
    return SetupError(
        f"talking to MLflow at {uri.replace(private, '')}",
        found=found.replace(private, ""),
        expected=expected,
        fix=fix,
    )


@contextmanager
def parent_run(
    settings: Settings, experiment: str, config: Mapping[str, Any], tags: Mapping[str, str]
) -> Iterator[Run]:
    """The run of one flow run: config as params, system metrics while it lasts, ended with the truth."""
    check_server(settings.mlflow_uri)
    client = open_client(settings)
    with named_errors(settings.mlflow_uri, right_to_edit(experiment)):
        experiment_id = _experiment(client, settings, experiment)
        created = client.create_run(experiment_id, tags=dict(tags), run_name=tags.get("prefect.flow_run_name"))
    run = Run(client, created.info.run_id, experiment_id)
    monitor = SystemMetricsMonitor(  # type: ignore[no-untyped-call]
        run.id, sampling_interval=SYSTEM_METRICS_INTERVAL_SECONDS, tracking_uri=settings.mlflow_uri
    )
    with named_errors(settings.mlflow_uri, right_to_edit(experiment)), ExitStack() as stack:
        stack.callback(monitor.finish)
        stack.push(partial(_end, run))
        monitor.start()  # type: ignore[no-untyped-call]
        run.params(config)
        run.json("config.json", config)
        yield run


@contextmanager
def child_run(
    settings: Settings, parent: str, stage: str, config: Mapping[str, Any], splits: Collection[str] = ()
) -> Iterator[Run]:
    """The run of one stage, nested under the flow's; those of the flow's datasets are its inputs that are `splits`."""
    client = open_client(settings)
    experiment_id = client.get_run(parent).info.experiment_id
    created = client.create_run(experiment_id, tags={MLFLOW_PARENT_RUN_ID: parent, "stage": stage}, run_name=stage)
    run = Run(client, created.info.run_id, experiment_id)
    with ExitStack() as stack:
        stack.push(partial(_end, run))
        if config:
            run.params(config)
        if splits and (used := datasets.of_run(client, parent, splits)):
            client.log_inputs(run.id, used)
        yield run


def run_url(settings: Settings, run_id: str, experiment_id: str) -> str:
    """Page of a run, without the login that may stand in the server's address. A database has no address of its own:
    then where `mlflow ui` shows it by default."""
    return f"{_base(settings)}/#/experiments/{experiment_id}/runs/{run_id}"


def version_url(settings: Settings, name: str, number: str) -> str:
    """Page of a model version; see `run_url`."""
    return f"{_base(settings)}/#/models/{name}/versions/{number}"


def _base(settings: Settings) -> str:
    base = settings.mlflow_uri if settings.mlflow_uri.startswith("http") else DEFAULT_UI
    return without_logins(base).rstrip("/")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as ``a.b.c -> text``."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = str(value)
    return flat


def _end(
    run: Run, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
) -> None:
    """End the run FINISHED, FAILED with the error as a tag, or KILLED when the process was told to stop."""
    if error is not None:
        run.tag("error", f"{type(error).__name__}: {error}"[:MAX_TAG_LENGTH])
    status = "FINISHED" if error is None else "FAILED" if isinstance(error, Exception) else "KILLED"
    run.client.set_terminated(run.id, status)


def _experiment(client: MlflowClient, settings: Settings, name: str) -> str:
    """The experiment's id; made if absent. Beside a local database, artifacts lie under `home`."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    local = None if settings.mlflow_uri.startswith("http") else (settings.home / "mlflow-artifacts" / name).absolute()
    try:
        return str(client.create_experiment(name, artifact_location=local.as_uri() if local else None))
    except MlflowException:
        found = client.get_experiment_by_name(name)  # another flow run made it meanwhile
        if found is None:
            raise
        return str(found.experiment_id)
