"""The encrypted line, from the command to the server, and then a search for every secret in all that was written.

Real servers, real commands. What is searched: every object of the store, the stages' own store, MLflow's database and
artifacts, Prefect's database (parameters, logs), the servers' logs, what the commands printed, and error messages.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient

from modelpress import keys, load, run_records
from modelpress.cipher import LocalKey, secrets
from modelpress.errors import AccessDeniedError, EncryptionKeyError
from modelpress.store import open_store
from serving.protocol import encode_request
from tests import warm
from tests.conftest import ROOT, OpenS3, S3Server
from tests.integration.small_workloads import WIDTH
from tests.integration.test_bad_input import NAME, RECIPE
from tests.serving.conftest import Server

KEY = b"a wrapping key of known bytes..!"
PASSWORD = "tracking-password-5f2c"
SESSION = "no-such-secret-71d0"


def needles(secret: bytes | str) -> set[bytes]:
    """A secret as it could stand somewhere: its bytes, as hex, base64, quoted for an address, escaped in JSON."""
    data = secret.encode() if isinstance(secret, str) else secret
    plain = base64.b64encode(data)
    forms = {
        data,
        data.hex().encode(),
        data.hex().upper().encode(),
        plain,
        plain.rstrip(b"="),
        plain.replace(b"/", b"_"),
    }
    if isinstance(secret, str):
        forms |= {quote(secret, safe="").encode(), json.dumps(secret)[1:-1].encode()}
    return forms


def found_in(content: Mapping[str, bytes], secret: bytes | str) -> list[str]:
    return [place for place, data in content.items() if any(needle in data for needle in needles(secret))]


def files_below(*folders: Path) -> dict[str, bytes]:
    found = {}
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                found[str(path)] = path.read_bytes()
    return found


@pytest.mark.s3
def test_secrets_stay_out_of_all_that_is_written(
    open_s3: OpenS3,
    s3_server: S3Server,
    prefect_server: str,
    mlflow_server: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = open_store(f"{open_s3('writer').uri}/secret", s3_server.settings())
    host = urlsplit(mlflow_server).netloc
    environment = {
        **s3_server.environment(),
        "MODELPRESS_HOME": str(tmp_path / "home"),
        "MODELPRESS_STORE": store.uri,
        "MODELPRESS_KEY": base64.b64encode(KEY).decode(),
        "MODELPRESS_TRACKING_URI": f"http://someone:{PASSWORD}@{host}",
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        "PREFECT_API_URL": prefect_server,
        "PREFECT_LOGGING_LEVEL": "DEBUG",
        "PYTHONPATH": str(ROOT),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    printed: dict[str, bytes] = {}

    def command(*arguments: str, code: int = 0, **more: str) -> str:
        done = warm.flows().run(*arguments, env=os.environ | more, timeout=240, cwd=tmp_path)
        printed[f"printed by {' '.join(arguments[:2])} {len(printed)}"] = (done.stdout + done.stderr).encode()
        assert done.returncode == code, done.stderr
        return done.stdout

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "upload": {"encrypt": True}}))
    result = json.loads(command("run", str(recipe), "--json"))
    pack = result["pack"]
    manifest = load.load_manifest(store, NAME, pack)
    assert manifest.encryption is not None
    secret = secrets.find(store, NAME, manifest.encryption.secret, [LocalKey(KEY)])

    links = tmp_path / "links.json"
    command("share", f"{NAME}@champion", "--for", "5m", "--to", str(links))
    signature = parse_qs(urlsplit(next(iter(json.loads(links.read_text())["objects"].values()))["url"]).query)
    nobody = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    command("pull", NAME, "--as", "onnx", "--to", "pulled", "--store", f"links+file://{links}", **nobody)
    assert (tmp_path / "pulled" / "model.onnx").stat().st_size > 0

    server = Server(store, NAME)
    try:
        body = encode_request({"input": np.zeros((1, WIDTH), np.float32)})
        answer = server.client.post(f"/v2/models/{NAME}/infer", content=body)
        assert answer.status_code == 200, answer.text
        assert pack in server.client.get(f"/v2/models/{NAME}").text
    finally:
        server.stop()
    printed["the server's log"] = "".join(server.lines).encode()

    errors = EncryptionKeyError.exit_code, AccessDeniedError.exit_code
    command("verify", NAME, code=errors[0], MODELPRESS_KEY=base64.b64encode(b"w" * 32).decode())
    command("verify", NAME, code=errors[1], AWS_SECRET_ACCESS_KEY=SESSION)
    command("run", str(recipe), code=3, MODELPRESS_TRACKING_URI=f"http://someone:{PASSWORD}@127.0.0.1:9")

    base = tmp_path_factory.getbasetemp()
    servers = [folder for name in ("prefect*", "mlflow*") for folder in base.glob(name)]
    assert len(servers) >= 2
    content = printed | {info.key: store.get(info.key) for info in store.list()}
    content |= files_below(*servers, tmp_path / "home", tmp_path / "pulled")
    for place in ("packs/", "prefect.db", "mlflow.db", "printed by run"):
        assert any(place in name for name in found_in(content, pack)), f"the search sees what stands in {place}"
    assert keys.secret(NAME, 1) in content
    (kept,) = [one.record for one in run_records.kept(store, NAME, pack) if one.record is not None]
    page = run_records.read_page(store, kept)
    assert "The way, stage by stage" in page.decode(), "the page lies beside the pack"
    client = MlflowClient(mlflow_server, mlflow_server)
    parent = client.get_run(result["mlflow_run"])
    stages = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert len(stages) > 4
    told = {entry.path for run in (parent, *stages) for entry in client.list_artifacts(run.info.run_id)}
    assert {"report.md", "stages.png", "result.json"} <= told
    assert not {"report.html", "report.json"} & told, "reports in the clear"
    for value in (KEY, secret, s3_server.writer[1], PASSWORD, SESSION, signature["X-Amz-Signature"][0], page):
        leaks = found_in(content, value)
        assert not leaks, f"{len(leaks)} places, such as {leaks[:10]}"
