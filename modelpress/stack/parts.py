"""Which programs make up the stack, and what each is given. modelpress imports none of them; it starts them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from modelpress.stack.credentials import (
    ARTIFACTS,
    MLFLOW_ADMIN,
    REGION,
    Credentials,
    address,
    client_environment,
    s3_environment,
)
from modelpress.stack.layout import Chosen, Folder
from modelpress.stack.supervisor import Part

LISTENING = ("s3", "prefect", "mlflow", "worker", "serving")
"""Parts that have a port; the worker's tells its health."""
USUAL_PORTS = {"s3": 7480, "prefect": 4200, "mlflow": 5000, "worker": 8081, "serving": 8080}
LEAST_S3_BYTES = 4 * 2**30
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # else seven more processes, for evaluations that nobody asks for
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "PYTHONUNBUFFERED": "1",
}
ELSEWHERE = ("PREFECT_", "MLFLOW_", "MODELPRESS_SERVING_")
ELSEWHERE_TOO = (
    *("MODELPRESS_HOME", "MODELPRESS_STORE", "MODELPRESS_WORK", "MODELPRESS_TRACKING_URI", "MODELPRESS_CHECKOUT"),
    *("MODELPRESS_STACK", "MODELPRESS_URL", "MODELPRESS_TOKEN"),
)


def build(folder: Folder, chosen: Chosen, keys: Credentials) -> list[Part]:
    """The parts, each after what it needs: those that `chosen` has a port for."""
    base = base_environment(os.environ, own_s3=not chosen.store)
    makers = {"s3": _s3, "prefect": _prefect, "mlflow": _mlflow, "worker": _worker, "serving": _serving}
    parts = [makers[name](folder, chosen, keys, base) for name in LISTENING if name in chosen.ports]
    servers = tuple(part.name for part in parts if part.name in ("s3", "prefect", "mlflow"))
    prepare = Part(
        name="prepare",
        command=(sys.executable, "-m", "modelpress.stack.prepare", str(folder.path)),
        environment=base | client_environment(folder, chosen, keys),
        needs=servers,
        once=True,
    )
    return [*parts[: len(servers)], prepare, *parts[len(servers) :]]


def base_environment(environment: Mapping[str, str], *, own_s3: bool) -> dict[str, str]:
    """The caller's environment without what leads to other servers; nor AWS's keys, beside an S3 server of its own."""
    prefixes = (*ELSEWHERE, "MODELPRESS_S3_", "AWS_") if own_s3 else ELSEWHERE
    kept = {
        name: value
        for name, value in environment.items()
        if not name.startswith(prefixes) and name not in ELSEWHERE_TOO
    }
    return kept | QUIET


def _s3(folder: Folder, chosen: Chosen, keys: Credentials, base: dict[str, str]) -> Part:
    script = str(Path(chosen.checkout, "infra", "s3", "server.py"))
    command = [sys.executable, script, "run", "--keep", "--folder", str(folder.path / "s3")]
    command += ["--listen", f"{chosen.host}:{chosen.ports['s3']}"]
    command += ["--capacity-bytes", str(max(LEAST_S3_BYTES, shutil.disk_usage(folder.path).free // 2))]
    command += ["--writer", str(keys.s3_writer), "--reader", str(keys.s3_reader)]
    where = address(chosen, "s3")
    return Part(name="s3", command=tuple(command), environment=base, health=where, address=where)


def _prefect(folder: Folder, chosen: Chosen, keys: Credentials, base: dict[str, str]) -> Part:
    where = address(chosen, "prefect")
    return Part(
        name="prefect",
        command=(
            *(sys.executable, "-m", "prefect", "server", "start"),
            *("--host", chosen.host, "--port", str(chosen.ports["prefect"])),
        ),
        environment={
            **base,
            "PREFECT_HOME": str(folder.path / "prefect"),
            "PREFECT_SERVER_API_AUTH_STRING": keys.prefect,
            "PREFECT_API_AUTH_STRING": keys.prefect,
            "PREFECT_SERVER_UI_API_URL": f"{where}/api",
        },
        health=f"{where}/api/ready",
        address=where,
    )


def _mlflow(folder: Folder, chosen: Chosen, keys: Credentials, base: dict[str, str]) -> Part:
    where, home = address(chosen, "mlflow"), folder.path / "mlflow"
    environment = {
        **base,
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{home}/mlflow.db",
        "MLFLOW_AUTH_CONFIG_PATH": str(home / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": keys.mlflow_admin,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": keys.mlflow_session,
    }
    artifacts = str(home / "artifacts")
    if not chosen.store:
        artifacts = ARTIFACTS
        environment |= {
            "MLFLOW_S3_ENDPOINT_URL": address(chosen, "s3"),
            "AWS_SHARED_CREDENTIALS_FILE": str(keys.s3_writer),
            "AWS_DEFAULT_REGION": REGION,
            # Ceph 16 knows no checksums at the end of a body, which boto3 sends unless it must not.
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }
    return Part(
        name="mlflow",
        command=(
            *(sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1"),
            *("--host", chosen.host, "--port", str(chosen.ports["mlflow"]), "--artifacts-destination", artifacts),
            *("--allowed-hosts", f"{chosen.host}:{chosen.ports['mlflow']},localhost:{chosen.ports['mlflow']}"),
        ),
        environment=environment,
        health=f"{where}/health",
        address=where,
    )


def write_mlflow_logins(folder: Folder) -> None:
    """Make MLflow's folder and its configuration: who has a login may read all, and write what they made."""
    home = folder.path / "mlflow"
    home.mkdir(mode=0o700, exist_ok=True)
    lines = ("[mlflow]", "default_permission = READ", f"database_uri = sqlite:///{home}/logins.db")
    (home / "auth.ini").write_text("\n".join([*lines, f"admin_username = {MLFLOW_ADMIN}", ""]))


def _worker(folder: Folder, chosen: Chosen, keys: Credentials, base: dict[str, str]) -> Part:
    return Part(
        name="worker",
        command=(
            *(sys.executable, "-m", "prefect", "worker", "start", "--pool", "cpu", "--type", "process"),
            *("--name", "modelpress-stack", "--limit", "1", "--with-healthcheck"),
        ),
        environment={
            **base,
            **client_environment(folder, chosen, keys),
            "PREFECT_HOME": str(folder.path / "home" / "prefect"),
            "PREFECT_WORKER_WEBSERVER_HOST": chosen.host,
            "PREFECT_WORKER_WEBSERVER_PORT": str(chosen.ports["worker"]),
        },
        needs=("prepare",),
        health=f"{address(chosen, 'worker')}/health",
        address="pool cpu, one run at a time",
        orphans_end=False,  # a run that goes on without its worker is half done
    )


def _serving(folder: Folder, chosen: Chosen, keys: Credentials, base: dict[str, str]) -> Part:
    where, home = address(chosen, "serving"), folder.path / "home"
    environment = {
        **base,
        "MODELPRESS_HOME": str(home),
        "MODELPRESS_STORE": client_environment(folder, chosen, keys)["MODELPRESS_STORE"],
        "MODELPRESS_SERVING_HOST": chosen.host,
        "MODELPRESS_SERVING_PORT": str(chosen.ports["serving"]),
        "MODELPRESS_SERVING_TOKEN_FILE": str(folder.keys / "serving"),
    }
    if not chosen.store:
        environment |= s3_environment(chosen, keys.s3_reader)
    return Part(
        name="serving",
        command=(sys.executable, "-m", "serving"),
        environment=environment,
        needs=("prepare",),
        health=f"{where}/v2/health/live",
        address=f"{where}/v2",
        stop_seconds=40.0,  # longer than it waits for running requests
    )
