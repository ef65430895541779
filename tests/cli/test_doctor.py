"""The doctor: each check can fail, says how to mend it, and counts in the exit code."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

from modelpress import cli
from modelpress.doctor import GIB, Finding, _amount, check_provider, examine
from modelpress.errors import SetupError
from modelpress.settings import Settings
from modelpress.trust import Signer, TrustedKey, new_key
from modelpress.trust.policy import entry_of
from tests.integration.conftest import mlflow_server, prefect_server

__all__ = ["mlflow_server", "prefect_server"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MODELPRESS_HOME", str(tmp_path / "home"))
    for name in ("MODELPRESS_STORE", "MODELPRESS_WORK", "MODELPRESS_TRACKING_URI", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that is taken and answers nobody."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture
def answering(request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of an HTTP server that answers with the status given as parameter."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(request.param if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def finding(check: str) -> Finding:
    return next(one for one in examine(Settings()) if one.check == check)


def test_a_sound_machine(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)
    by_check = {one["check"]: one for one in findings}
    assert {"Python", "packages", "torch", "store", "work store", "MLflow", "Prefect", "disk", "memory"} <= set(
        by_check
    )
    assert by_check["ONNX Runtime CPUExecutionProvider"]["status"] == "ok"
    assert "second conditional write was refused" in by_check["store"]["found"]
    assert all(one["fix"] for one in findings if one["status"] != "ok")
    assert (ended.value.code != 0) == any(one["status"] == "fail" for one in findings)


def test_a_store_that_is_none(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "file").write_text("no folder")
    monkeypatch.setenv("MODELPRESS_STORE", str(home / "file"))
    assert finding("store").status == "fail"
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor"])
    assert ended.value.code == 3
    assert "fail store" in capsys.readouterr().out


def test_a_store_address_that_is_none(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELPRESS_STORE", "ftp://somewhere")
    found = finding("store")
    assert (found.status, found.found) == ("fail", "ftp://somewhere")
    assert "s3://" in found.fix


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_provider_that_is_missing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--provider", "CUDAExecutionProvider"])
    out = capsys.readouterr().out
    assert ended.value.code == 3
    assert "fail ONNX Runtime CUDAExecutionProvider" in out
    assert "mend: install the CUDA" in out
    with pytest.raises(SetupError):
        check_provider("CUDAExecutionProvider")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_really_used(home: Path) -> None:
    assert check_provider("CUDAExecutionProvider")


@pytest.mark.parametrize(("variable", "check"), [("MODELPRESS_TRACKING_URI", "MLflow"), ("PREFECT_API_URL", "Prefect")])
def test_a_server_that_is_down(
    home: Path, monkeypatch: pytest.MonkeyPatch, closed_port: int, variable: str, check: str
) -> None:
    monkeypatch.setenv(variable, f"http://127.0.0.1:{closed_port}")
    found = finding(check)
    assert found.status == "fail"
    assert variable in found.fix


@pytest.mark.parametrize(
    ("answering", "status"),
    [(401, "warn"), (403, "warn"), (404, "fail"), (500, "fail")],
    indirect=["answering"],
)
def test_a_server_that_answers(home: Path, monkeypatch: pytest.MonkeyPatch, answering: str, status: str) -> None:
    monkeypatch.setenv("MODELPRESS_TRACKING_URI", answering)
    assert finding("MLflow").status == status


@pytest.mark.parametrize(
    ("variable", "check", "server"),
    [("MODELPRESS_TRACKING_URI", "MLflow", "mlflow_server"), ("PREFECT_API_URL", "Prefect", "prefect_server")],
)
def test_a_real_server_that_answers(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    variable: str,
    check: str,
    server: str,
) -> None:
    monkeypatch.setenv(variable, request.getfixturevalue(server))
    assert finding(check).status == "ok"


@pytest.mark.parametrize(("have", "status"), [(20 * GIB, "ok"), (5 * GIB, "warn"), (GIB // 2, "fail")])
def test_amounts(have: int, status: str) -> None:
    found = _amount("disk", have, GIB, 10 * GIB, "free", "free space")
    assert found.status == status
    assert bool(found.fix) == (status != "ok")


@pytest.fixture
def signer(home: Path, monkeypatch: pytest.MonkeyPatch) -> Signer:
    """Whose key the settings name."""
    made = new_key(home / "key.pem")
    monkeypatch.setenv("MODELPRESS_SIGNING_KEY_FILE", str(home / "key.pem"))
    return made


def trust_file(path: Path, monkeypatch: pytest.MonkeyPatch, *keys: TrustedKey) -> None:
    document = {"format_version": 1, "required": ["publisher"], "pointers": ["publisher"]}
    path.write_text(json.dumps(document | {"keys": [key.model_dump(mode="json", exclude_none=True) for key in keys]}))
    monkeypatch.setenv("MODELPRESS_TRUST", str(path))


def test_signatures_that_nobody_asks_for(home: Path) -> None:
    assert finding("signatures").status == "ok"
    assert "none are asked for" in finding("signatures").found


def test_a_key_that_counts(home: Path, signer: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    trust_file(home / "trust.json", monkeypatch, entry_of(signer, "farm", "publisher", ["*"]))
    found = finding("signatures")
    assert found.status == "ok"
    assert "1 of 1 keys count" in found.found
    assert signer.key_id[:12] in found.found


def test_a_key_of_our_own_that_the_file_lacks(home: Path, signer: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    trust_file(home / "trust.json", monkeypatch, entry_of(new_key(home / "two.pem"), "farm", "publisher", ["*"]))
    found = finding("signatures")
    assert (found.status, "not in the file" in found.found) == ("warn", True)


def test_keys_that_end(home: Path, signer: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = entry_of(signer, "farm", "publisher", ["*"])
    today = datetime.now(UTC)
    for days, status in ((90, "ok"), (3, "warn"), (-1, "fail")):
        ending = entry.model_copy(update={"valid_until": today + timedelta(days=days)})
        trust_file(home / "trust.json", monkeypatch, ending)
        assert finding("signatures").status == status
    trust_file(home / "trust.json", monkeypatch, entry.model_copy(update={"revoked": today}))
    assert "revoked" in finding("signatures").found


def test_a_trust_file_that_is_none(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELPRESS_TRUST", str(home / "nowhere"))
    assert finding("signatures").status == "fail"
    assert finding("signatures").fix
