"""Servers of a benchmark's own: Prefect, S3."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[1]
PREFIX = "MODELPRESS_TEST_S3_"
"""Of the variables that say where an S3 server is, and with which keys."""
START_SECONDS = 120
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(START_SECONDS),
}


def free_port() -> int:
    """A port of loopback's that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def prefect_server(home: Path, more: Mapping[str, str] | None = None) -> Iterator[str]:
    """The address of a server's API.

    Args:
        home: its files lie below it; what it says, in `server.log`.
        more: of its environment.

    Raises:
        RuntimeError: it does not become healthy.
    """
    folder, port = home / "server", free_port()
    folder.mkdir()
    url = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, **QUIET, "PREFECT_HOME": str(folder), **(more or {})}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        end = time.monotonic() + START_SECONDS
        while not _healthy(f"{url}/health"):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the Prefect server did not start:\n{(folder / 'server.log').read_text()[-3000:]}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _healthy(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def s3_server() -> Iterator[tuple[Path, dict[str, str]]]:
    """The folder of a Ceph RGW on loopback, and the variables that say where it is and with which keys."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "ceph")
        command = [sys.executable, str(ROOT / "infra/s3/server.py"), "run", "--folder", str(folder)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            said = {}
            while line := process.stdout.readline():
                key, _, value = line.removeprefix("export ").strip().partition("=")
                said[key] = value
                if key == f"{PREFIX}READER_SECRET":
                    break
            else:
                raise SystemExit("no S3 server: see above")
            try:
                yield folder, said
            finally:
                process.stdin.close()  # it ends with its standard input
