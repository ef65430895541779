"""A real Prefect server and a real MLflow server on free ports, once per session."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW, temporary_settings

QUIET = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
START_SECONDS = 90


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """API URL of a Prefect server on SQLite; flows of this process run on it."""
    home, port = tmp_path_factory.mktemp("prefect"), _free_port()
    command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}/api"
    here = {PREFECT_API_URL: url, PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW: "ignore"}
    with _serving(command, f"{url}/health", home, {"PREFECT_HOME": str(home)}), temporary_settings(here):
        yield url


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of an MLflow server on SQLite that keeps the artifacts itself."""
    home, port = tmp_path_factory.mktemp("mlflow"), _free_port()
    command = [
        *("mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{home}/mlflow.db", "--artifacts-destination", str(home / "artifacts")),
    ]
    with _serving(command, f"http://127.0.0.1:{port}/health", home, {}):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def _serving(command: list[str], health: str, home: Path, environment: dict[str, str]) -> Iterator[None]:
    log = home / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env={**os.environ, **QUIET, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=home,
        )
        try:
            _wait(process, health, log)
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
