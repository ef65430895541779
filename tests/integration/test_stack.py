"""`modelpress up` with the real programs: every door has a lock, what dies comes back with its data, nothing stays."""

from __future__ import annotations

import configparser
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import psutil
import pytest
import yaml
from botocore.config import Config
from botocore.exceptions import ClientError

from modelpress.stack import processes
from modelpress.stack.layout import Folder
from modelpress.stack.parts import LISTENING
from tests.conftest import ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.s3, pytest.mark.timeout(600)]
DEADLINE_SECONDS = 300.0
ANY_PORT = [f"--port={name}=0" for name in LISTENING]
DEPLOYMENTS = {one["name"] for one in yaml.safe_load((ROOT / "infra/prefect.yaml").read_text())["deployments"]}


def modelpress(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As a user calls it, whose shell knows other servers, too."""
    elsewhere = {"PREFECT_API_URL": "http://127.0.0.1:9/api", "MODELPRESS_STORE": "/nowhere", "AWS_PROFILE": "other"}
    return subprocess.run(
        [sys.executable, "-m", "modelpress.cli", *arguments, "--folder", str(folder)],
        cwd=ROOT,
        env={**os.environ, **elsewhere, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folder]:
    pytest.importorskip("flask_wtf", reason="MLflow's basic-auth app needs Flask-WTF, which the dev extra brings")
    folder = Folder(tmp_path_factory.mktemp("local") / "stack")
    # Two at once: one starts, the other waits for it.
    other = subprocess.Popen(
        [sys.executable, "-m", "modelpress.cli", "up", *ANY_PORT, "--folder", str(folder.path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        while folder.read_chosen() is None and other.poll() is None:
            time.sleep(0.05)
        done = modelpress(folder.path, "up")
        said, _ = other.communicate(timeout=DEADLINE_SECONDS)
        assert other.returncode == 0, said
        assert done.returncode == 0, done.stderr
        assert "bearer token in" in done.stdout
        assert "starting" in said
        assert "starting" not in done.stdout
        yield folder
    finally:
        other.kill()
        other.wait()
        modelpress(folder.path, "down")


def state(folder: Folder) -> dict[str, dict[str, Any]]:
    return {part["name"]: part for part in json.loads(modelpress(folder.path, "status", "--json").stdout)["parts"]}


def healthy(folder: Folder) -> dict[str, dict[str, Any]]:
    end = time.monotonic() + DEADLINE_SECONDS
    while modelpress(folder.path, "status").returncode != 0:
        assert time.monotonic() < end, folder.log("supervisor").read_text()
        time.sleep(0.5)
    return state(folder)


def secret(folder: Folder, name: str) -> str:
    text = (folder.keys / name).read_text().strip()
    if name.startswith("s3-"):
        parser = configparser.ConfigParser(interpolation=None)
        parser.read_string(text)
        return parser["default"]["aws_secret_access_key"]
    return text


def s3(folder: Folder, role: str) -> Any:
    chosen = folder.read_chosen()
    assert chosen is not None
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string((folder.keys / role).read_text())
    return boto3.client(
        "s3",
        "us-east-1",
        endpoint_url=f"http://127.0.0.1:{chosen.ports['s3']}",
        aws_access_key_id=parser["default"]["aws_access_key_id"],
        aws_secret_access_key=parser["default"]["aws_secret_access_key"],
        config=Config(request_checksum_calculation="when_required", retries={"total_max_attempts": 1}),
    )


def test_everything_is_healthy_and_on_loopback(stack: Folder) -> None:
    parts = healthy(stack)
    assert [*parts] == ["s3", "prefect", "mlflow", "prepare", "worker", "serving"]
    chosen = stack.read_chosen()
    assert chosen is not None
    ours = {process.pid for process in processes.marked(f"{chosen.identity}/")}
    listening = {
        connection.laddr
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.pid in ours
    }
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert set(chosen.ports.values()) <= {address.port for address in listening}


def test_every_door_asks_who_comes(stack: Folder) -> None:
    chosen = stack.read_chosen()
    assert chosen is not None
    at = {name: f"http://127.0.0.1:{port}" for name, port in chosen.ports.items()}
    user, _, password = secret(stack, "prefect").partition(":")
    runs = f"{at['mlflow']}/api/2.0/mlflow/experiments/search?max_results=1"
    users = f"{at['mlflow']}/api/2.0/mlflow/users/list"
    writer, admin = ("modelpress", secret(stack, "mlflow")), ("admin", secret(stack, "mlflow-admin"))
    for url, nobody, stranger in (
        (f"{at['prefect']}/api/admin/version", None, ("modelpress", "x")),
        (runs, None, ("modelpress", "x")),
        (users, None, ("admin", "password1234")),
    ):
        assert httpx.get(url, auth=nobody).status_code == 401, url
        assert httpx.get(url, auth=stranger).status_code == 401, url
    assert httpx.get(f"{at['prefect']}/api/admin/version", auth=(user, password)).status_code == 200
    assert httpx.get(runs, auth=writer).status_code == 200
    new = {"username": "thief", "password": "0123456789abcdef"}
    assert httpx.post(f"{at['mlflow']}/api/2.0/mlflow/users/create", json=new, auth=writer).status_code == 403
    assert httpx.get(users, auth=admin).status_code == 200
    assert httpx.get(f"{at['serving']}/v2").status_code == 401
    token = {"Authorization": f"Bearer {secret(stack, 'serving')}"}
    assert httpx.get(f"{at['serving']}/v2", headers=token).status_code == 200
    assert httpx.get(f"{at['s3']}/modelpress").status_code == 403
    with pytest.raises(ClientError, match="AccessDenied"):
        s3(stack, "s3-reader").put_object(Bucket="modelpress", Key="x", Body=b"x")


def test_a_run_can_be_started_at_once(stack: Folder) -> None:
    """The deployments are there, and the worker runs one: with all its logins, on the stack's own store."""
    chosen = stack.read_chosen()
    assert chosen is not None
    user, _, password = secret(stack, "prefect").partition(":")
    api = httpx.Client(base_url=f"http://127.0.0.1:{chosen.ports['prefect']}/api", auth=(user, password), timeout=60)
    found = {one["name"]: one["id"] for one in api.post("/deployments/filter", json={}).json()}
    assert set(found) == DEPLOYMENTS
    run = api.post(f"/deployments/{found['collect']}/create_flow_run", json={"state": {"type": "SCHEDULED"}}).json()
    end = time.monotonic() + DEADLINE_SECONDS
    while (kind := api.get(f"/flow_runs/{run['id']}").json()["state"]["type"]) not in (
        "COMPLETED",
        "FAILED",
        "CRASHED",
    ):
        assert time.monotonic() < end, stack.log("worker").read_text()[-3000:]
        time.sleep(0.5)
    assert kind == "COMPLETED", stack.log("worker").read_text()[-3000:]


def test_what_is_killed_comes_back_with_what_it_held(stack: Folder) -> None:
    before = healthy(stack)
    s3(stack, "s3-writer").put_object(Bucket="modelpress-work", Key="kept", Body=b"kept")
    killed = [before[name]["pid"] for name in ("s3", "mlflow")]
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + DEADLINE_SECONDS
    while not all(state(stack)[name]["restarts"] for name in ("s3", "mlflow")):
        assert time.monotonic() < end, stack.log("supervisor").read_text()
        time.sleep(0.2)
    after = healthy(stack)
    assert not {after[name]["pid"] for name in ("s3", "mlflow")} & set(killed)
    assert after["prefect"]["pid"] == before["prefect"]["pid"]
    answer = s3(stack, "s3-reader").get_object(Bucket="modelpress-work", Key="kept")
    assert answer["Body"].read() == b"kept"
    assert "ended by SIGKILL" in modelpress(stack.path, "logs", "supervisor").stdout


def test_no_secret_is_in_a_log_or_on_a_command_line(stack: Folder) -> None:
    secrets = [
        secret(stack, path.name).rpartition(":")[2] for path in stack.keys.iterdir() if path.name != "environment"
    ]
    assert len(secrets) == 7
    chosen = stack.read_chosen()
    assert chosen is not None
    shown = [" ".join(process.cmdline()) for process in processes.marked(f"{chosen.identity}/")]
    shown += [stack.chosen.read_text(), stack.state.read_text()]
    shown += [path.read_text(errors="replace") for path in [*stack.logs.iterdir(), *(stack.path / "s3").glob("*.log")]]
    assert len(shown) > 10
    assert not [text for text in shown if any(word in text for word in secrets)]


def test_down_leaves_the_data_and_no_process_and_no_port(stack: Folder) -> None:
    chosen = stack.read_chosen()
    assert chosen is not None
    done = modelpress(stack.path, "down")
    assert done.returncode == 0, done.stderr
    assert "its data stays" in done.stdout
    assert "killed" not in stack.log("supervisor").read_text(), "each ended when it was asked to"
    assert processes.marked(f"{chosen.identity}/") == []
    for port in chosen.ports.values():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    assert modelpress(stack.path, "status").returncode == 3
    assert modelpress(stack.path, "down").returncode == 0
    assert (stack.path / "s3" / "osd" / "block").exists()
    done = modelpress(stack.path, "down", "--delete", "--yes")
    assert done.returncode == 0, done.stderr
    assert not stack.path.exists()
