"""A real Prefect server and a real MLflow server on free ports, once per session."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from cryptography.fernet import Fernet
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW, temporary_settings

from tests.conftest import S3Server
from tests.databases import Databases
from tests.integration import postgres

QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # else seven more processes, for evaluations that nobody asks for
}
START_SECONDS = 240


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory, databases: Databases) -> Iterator[str]:
    """API URL of a Prefect server on SQLite; flows of this process run on it."""
    home, port = tmp_path_factory.mktemp("prefect"), free_port()
    command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}/api"
    here = {PREFECT_API_URL: url, PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW: "ignore"}
    environment = {"PREFECT_HOME": str(home), "PREFECT_UI_API_URL": url}  # the pages ask at port 4200 otherwise
    with ExitStack() as server:
        with databases.ready("prefect", home / "prefect.db"):
            server.enter_context(serving(command, f"{url}/health", home, environment))
        server.enter_context(temporary_settings(here))
        yield url


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory, databases: Databases) -> Iterator[str]:
    """URL of an MLflow server on SQLite that keeps the artifacts itself, and sends webhooks to this machine."""
    home, port = tmp_path_factory.mktemp("mlflow"), free_port()
    webhooks = {
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": Fernet.generate_key().decode(),
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "https,http",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_CACHE_TTL": "1",  # else a webhook that is made is heard of a minute later
    }
    command = [
        *("mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{home}/mlflow.db", "--artifacts-destination", str(home / "artifacts")),
    ]
    with ExitStack() as server:
        with databases.ready("mlflow", home / "mlflow.db"):
            server.enter_context(serving(command, f"http://127.0.0.1:{port}/health", home, webhooks))
        yield f"http://127.0.0.1:{port}"


@dataclass(frozen=True)
class MlflowLogins:
    """An MLflow server with its own logins, and who has one."""

    uri: str
    artifacts: str
    """Where the server keeps artifacts."""
    database: str
    """Where it keeps runs and logins."""
    passwords: dict[str, str]

    def log_in(self, patch: pytest.MonkeyPatch, user: str) -> None:
        """Let this process be that user."""
        patch.setenv("MLFLOW_TRACKING_USERNAME", user)
        patch.setenv("MLFLOW_TRACKING_PASSWORD", self.passwords[user])

    def grant(self, user: str, kind: str, identity: str) -> None:
        """Let the administrator say that a user may edit something."""
        from mlflow.server import get_app_client  # brings a web server with it

        with pytest.MonkeyPatch.context() as patch:
            self.log_in(patch, "admin")
            get_app_client("basic-auth", self.uri).grant_user_permission(user, kind, identity, "EDIT")


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an empty database: PostgreSQL's where it is to be had, else SQLite's."""
    if postgres.lacking():
        yield f"sqlite:///{tmp_path_factory.mktemp('database')}/mlflow.db"
        return
    with postgres.running(free_port()) as address:
        yield address


@pytest.fixture(scope="session")
def mlflow_with_logins(
    tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server, database: str
) -> Iterator[MlflowLogins]:
    """MLflow's basic-auth server, which keeps artifacts on S3; everybody may read, and write what is their own."""
    pytest.importorskip("flask_wtf", reason="MLflow's basic-auth app needs Flask-WTF, which the dev extra brings")
    from mlflow.server import get_app_client

    home, port = tmp_path_factory.mktemp("logins"), free_port()
    names = ("admin", "farm", "colleague", "guest")
    logins = MlflowLogins(
        f"http://127.0.0.1:{port}",
        f"s3://{s3_server.bucket}/mlflow-{uuid.uuid4().hex[:12]}",
        database,
        {name: f"password of {name}" for name in names},
    )
    lines = ("[mlflow]", "default_permission = READ", f"database_uri = {database}", "admin_username = admin")
    # A password that was right is not hashed anew at each request: scrypt takes most of a flow's time otherwise.
    (home / "auth.ini").write_text("\n".join((*lines, "auth_cache_ttl_seconds = 3600", "")))
    key, secret = s3_server.writer
    environment = {
        "MLFLOW_BACKEND_STORE_URI": database,
        "MLFLOW_AUTH_CONFIG_PATH": str(home / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": logins.passwords["admin"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": uuid.uuid4().hex,
        "MLFLOW_S3_ENDPOINT_URL": s3_server.endpoint,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": s3_server.region,
        # Ceph 16 knows no checksums at the end of a body, which boto3 sends unless it must not.
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }
    command = [
        *("mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--app-name", "basic-auth"),
        *("--artifacts-destination", logins.artifacts),
    ]
    with serving(command, f"{logins.uri}/health", home, environment):
        with pytest.MonkeyPatch.context() as patch:
            logins.log_in(patch, "admin")
            for name in names[1:]:
                get_app_client("basic-auth", logins.uri).create_user(name, logins.passwords[name])
        yield logins


@contextmanager
def serving(command: list[str], health: str, home: Path, environment: dict[str, str]) -> Iterator[None]:
    log = home / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env={**os.environ, **QUIET, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=home,
            start_new_session=True,  # `mlflow models serve` leaves its own server behind when it alone is ended
        )
        try:
            _wait(process, health, log)
            yield
        finally:
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(20)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(process: subprocess.Popen[bytes], health: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            if httpx.get(health, timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"{process.args!r} did not become healthy:\n{log.read_text()[-3000:]}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
