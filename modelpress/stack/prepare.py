"""`python -m modelpress.stack.prepare FOLDER`: what is done once the servers run. A part of the stack that ends.

Buckets, MLflow's user, work pools and deployments; what is there already stays as somebody may have changed it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import httpx

from modelpress import __version__
from modelpress.errors import ModelpressError, SetupError
from modelpress.settings import read_settings
from modelpress.stack.credentials import BUCKETS, MLFLOW_ADMIN, STORE, USER, Credentials, address, make_credentials
from modelpress.stack.layout import Chosen, Folder, write

READER = "arn:aws:iam:::user/modelpress:reader"
"""The user of the key that only reads; `infra/s3/server.py` makes it."""
POOLS = ("cpu", "gpu")
CONFLICT = 409


def main() -> None:
    """Do all of it; errors that are ours end it with their text and exit code."""
    folder = Folder(Path(sys.argv[1]))
    try:
        chosen = folder.read_chosen()
        assert chosen is not None
        keys = make_credentials(folder)
        if not chosen.store:
            make_buckets()
        if "mlflow" in chosen.ports:
            make_user(address(chosen, "mlflow"), keys)
        if "prefect" in chosen.ports:
            make_pools(address(chosen, "prefect"), keys, Path(chosen.checkout))
            deploy(folder, chosen)
    except ModelpressError as error:
        sys.exit(f"error: {error}")
    except httpx.HTTPError as error:
        sys.exit(f"error: {error}")


def make_buckets() -> None:
    """The buckets of the stack's own S3 server, and the one right to write that its reading key has."""
    from modelpress.store.s3_buckets import let_count, make_bucket

    for name in BUCKETS:
        if make_bucket(name, read_settings()):
            print(f"made bucket {name}")
    bucket, _, prefix = STORE.removeprefix("s3://").partition("/")
    if let_count(bucket, prefix, READER, read_settings()):
        print(f"the server's key may write what it counts of canaries in {bucket}")


def make_user(mlflow: str, keys: Credentials) -> None:
    """The user whom runs log in as.

    Raises:
        SetupError: MLflow refuses it.
    """
    with httpx.Client(base_url=mlflow, trust_env=False, timeout=30) as client:
        answer = client.get("/api/2.0/mlflow/users/get", params={"username": USER}, auth=(USER, keys.mlflow))
        if answer.status_code == 200:
            return
        answer = client.post(
            "/api/2.0/mlflow/users/create",
            json={"username": USER, "password": keys.mlflow},
            auth=(MLFLOW_ADMIN, keys.mlflow_admin),
        )
    if answer.is_error:
        raise SetupError(
            f"making MLflow's user {USER!r}",
            found=f"status {answer.status_code}: {answer.text[:500]}",
            fix="if passwords were changed in MLflow, write them to keys/mlflow-admin and keys/mlflow",
        )
    print(f"made MLflow's user {USER}")


def make_pools(prefect: str, keys: Credentials, checkout: Path) -> None:
    """The work pools of the deployments.

    Raises:
        SetupError: Prefect refuses one.
    """
    template = json.loads((checkout / "infra" / "pools" / "process.json").read_text())
    user, _, password = keys.prefect.partition(":")
    with httpx.Client(base_url=f"{prefect}/api", auth=(user, password), trust_env=False, timeout=30) as client:
        for name in POOLS:
            body = {"name": name, "type": "process", "base_job_template": template}
            answer = client.post("/work_pools/", json=body)
            if answer.status_code == CONFLICT:
                continue
            if answer.is_error:
                found = f"status {answer.status_code}: {answer.text[:500]}"
                raise SetupError(f"making the work pool {name!r}", found=found)
            print(f"made work pool {name}")


def deploy(folder: Folder, chosen: Chosen) -> None:
    """Give the deployments to Prefect where the file, the version or the checkout is another than the last time: who
    switched a schedule on in the UI finds it on.

    Raises:
        SetupError: Prefect's command fails.
    """
    checkout = Path(chosen.checkout)
    file = checkout / "infra" / "prefect.yaml"
    digest = hashlib.sha256(b"\0".join([file.read_bytes(), __version__.encode(), str(checkout).encode()])).hexdigest()
    if digest == chosen.deployed:
        print("the deployments are there")
        return
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
    environment = {**os.environ, "PREFECT_HOME": str(folder.path / "home" / "prefect")}
    done = subprocess.run(command, cwd=checkout, env=environment, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise SetupError("deploying infra/prefect.yaml", found=f"exit code {done.returncode}; the lines above say why")
    write(folder.chosen, chosen.model_copy(update={"deployed": digest}).model_dump_json(indent=2))


if __name__ == "__main__":
    main()
