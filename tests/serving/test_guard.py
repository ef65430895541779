"""The token: who has it is answered, who has not is refused before anything is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

from modelpress.errors import ConfigError
from modelpress.store import open_store
from serving.app import create_app
from serving.guard import Guard, read_token
from serving.repository import Repository
from tests.serving.conftest import publish_pack, scale_model

TOKEN = "0123456789abcdef" * 2


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    store = open_store(str(tmp_path / "store"))
    publish_pack(store, tmp_path, scale_model(2.0), "scale")
    repository = Repository(store, ["scale"], provider="CPUExecutionProvider", threads=1, retry_seconds=1.0)
    repository.start()
    return TestClient(Guard(create_app(repository, poll_seconds=0, workers=1), TOKEN))


ASKS: list[tuple[str, str]] = [
    ("GET", "/v2"),
    ("GET", "/v2/models/scale"),
    ("GET", "/v2/models/scale/ready"),
    ("POST", "/v2/models/scale/infer"),
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/scale/load"),
    ("POST", "/v2/repository/models/scale/unload"),
    ("GET", "/nowhere"),
    ("GET", "/v2/health/live/"),
    ("GET", "/v2/health/../models/scale"),
]


@pytest.mark.parametrize(("method", "path"), ASKS)
@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"bearer{TOKEN}", f"Basic {TOKEN}", TOKEN],
)
def test_every_door_is_closed_without_it(client: TestClient, method: str, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    answer = client.request(method, path, headers=headers, content=b"{}" if method == "POST" else None)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert TOKEN not in answer.text


def test_two_tokens_are_none(client: TestClient) -> None:
    headers = httpx.Headers([("Authorization", "Bearer x"), ("Authorization", f"Bearer {TOKEN}")])
    assert client.get("/v2", headers=headers).status_code == 401


def test_who_has_it_is_answered_and_health_needs_none(client: TestClient) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert client.get("/v2/models/scale", headers=headers).json()["name"] == "scale"
    assert client.get("/v2/health/live").status_code == 200
    assert client.get("/v2/health/ready").status_code == 200


def test_a_token_is_read_without_its_line_end(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.touch(mode=0o600)
    path.write_text(f"{TOKEN}\n")
    assert read_token(path) == TOKEN


def open_to_all(path: Path) -> None:
    path.write_text(TOKEN)
    path.chmod(0o644)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (Path.unlink, "FileNotFoundError"),
        (lambda path: path.write_text(""), "0 characters"),
        (lambda path: path.write_text("short"), "5 characters"),
        (lambda path: path.write_text("two tokens in one file"), "white space"),
        (lambda path: path.write_text("ä" * 40), "UnicodeDecodeError"),
        (open_to_all, "everybody can read it"),
    ],
)
def test_a_file_that_holds_no_token_is_refused_without_showing_it(
    tmp_path: Path, write: Callable[[Path], object], words: str
) -> None:
    path = tmp_path / "token"
    path.touch(mode=0o600)
    write(path)
    with pytest.raises(ConfigError) as caught:
        read_token(path)
    assert words in str(caught.value)
    assert "MODELPRESS_SERVING_TOKEN_FILE" in str(caught.value)
    assert TOKEN not in str(caught.value)
