"""Going back over HTTP: by whom, from where, to what, and what the log and the audit say of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from modelpress import keys, load, pointer
from modelpress.access import KeyFile, new_key
from modelpress.store import Store
from serving.audit import Audit
from serving.keyring import Keyring, Sources
from serving.main import ServingSettings, application
from serving.protocol import decode_response, encode_request
from serving.repository import Repository
from tests.conftest import OpenS3
from tests.serving.conftest import WIDTH, publish_pack, scale_model
from tests.trust.teams import Team

Call = Callable[..., Any]
PATH = "/v2/repository/models/scale/rollback"
NOW = datetime.now(UTC)


@dataclass
class Desk:
    """A server over three packs, the last of them champion, and keys."""

    client: TestClient
    store: Store
    repository: Repository
    packs: list[str]
    keys: dict[str, str]
    audit: Path

    def back(self, *, key: str = "promote", **body: str) -> httpx.Response:
        return self.client.post(PATH, json=body, headers={"Authorization": f"Bearer {self.keys[key]}"})

    def current(self) -> pointer.Pointer:
        found = pointer.current(self.store, "scale", "champion")
        assert found is not None
        return found

    def answer(self) -> float:
        body = encode_request({"x": np.ones((1, WIDTH), np.float32)})
        headers = {"Authorization": f"Bearer {self.keys['infer']}"}
        return float(
            decode_response(self.client.post("/v2/models/scale/infer", content=body, headers=headers).content)["y"][
                0, 0
            ]
        )

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.audit.read_text().splitlines()]


@pytest.fixture
def desk(store: Store, press: Call, repository: Call, tmp_path: Path) -> Desk:
    packs = [press(scale_model(value)) for value in (1.0, 2.0, 3.0)]
    return make(store, repository("scale"), packs, tmp_path)


def make(store: Store, repository: Repository, packs: list[str], folder: Path, *, rollback: bool = True) -> Desk:
    made = {scope: new_key(scope, [scope], None, NOW) for scope in ("promote", "infer", "admin")}
    (folder / "keys.json").write_bytes(KeyFile(keys=tuple(key for _, key in made.values())).to_bytes())
    settings = ServingSettings(poll_seconds=0, workers=1, rollback=rollback)
    guard = application(repository, settings, Keyring(Sources(folder / "keys.json")), Audit(folder / "audit.jsonl"))
    keys = {scope: text for scope, (text, _) in made.items()}
    return Desk(TestClient(guard), store, repository, packs, keys, folder / "audit.jsonl")


def test_back_to_the_one_before_and_its_answers_at_once(desk: Desk) -> None:
    first, second, third = desk.packs
    assert desk.answer() == 3 * WIDTH
    answer = desk.back()
    assert answer.status_code == 200
    expected = {"name": "scale", "alias": "champion", "pack": second, "pointer": 4, "before": third, "answers": second}
    assert answer.json() == expected
    assert desk.answer() == 2 * WIDTH
    entry = desk.current()
    assert (entry.pack, entry.reason, entry.number) == (second, "rollback", 4)
    key = desk.keys["promote"].split("_")[1]
    assert entry.who.startswith(f"promote (key {key}) by "), "the person and the server"
    assert desk.back().json()["pack"] == first, "in a row they go further back"
    assert desk.back().status_code == 409
    assert [(line["action"], line["status"], line.get("pack"), line["who"]) for line in desk.lines()] == [
        ("rollback", 200, second, "promote"),
        ("rollback", 200, first, "promote"),
        ("rollback", 409, None, "promote"),
    ]
    assert desk.lines()[0]["before"] == third
    assert "nothing before" in desk.lines()[2]["why"]


def test_a_page_that_is_old_moves_nothing(desk: Desk) -> None:
    _, second, third = desk.packs
    assert desk.back(**{"from": second}).status_code == 409
    assert desk.current().pack == third
    assert desk.back(**{"from": third}).status_code == 200
    assert desk.back(**{"from": third}).status_code == 409, "a second click on what was seen before"


def test_a_retry_goes_no_further(desk: Desk) -> None:
    first = desk.back(token="0123456789abcdef", **{"from": desk.packs[2]})
    again = desk.back(token="0123456789abcdef", **{"from": desk.packs[2]})
    assert (first.status_code, again.json()) == (200, first.json())
    assert desk.current().number == 4


def test_to_a_pack_that_stood_before_and_to_no_other(desk: Desk, press: Call) -> None:
    never = press(scale_model(9.0), alias=None)
    for to in (never, desk.packs[2], "0" * 64):
        answer = desk.back(to=to)
        assert answer.status_code == 409, "past the gate leads no way"
        assert "stood before" in answer.json()["error"]
    assert desk.current().number == 3
    assert desk.back(to=desk.packs[0]).json()["pack"] == desk.packs[0]


@pytest.mark.parametrize(
    "body",
    [
        *(b"{", b"[]", b"1", b'"x"', b'{"to": 1}', b'{"to": null}', b'{"to": "short"}', b'{"from": "ABC"}'),
        *(b'{"token": "x"}', b'{"token": "with space"}', b'{"pack": "x"}', b'{"to": "' + b"0" * 63 + b'\xff"}'),
    ],
)
def test_another_body_is_refused(desk: Desk, body: bytes) -> None:
    answer = desk.client.post(PATH, content=body, headers={"Authorization": f"Bearer {desk.keys['promote']}"})
    assert answer.status_code == 400
    assert desk.current().number == 3


def test_a_large_body_is_refused(desk: Desk) -> None:
    headers = {"Authorization": f"Bearer {desk.keys['promote']}"}
    assert desk.client.post(PATH, content=b" " * 5000, headers=headers).status_code == 413


def test_nobody_else_may(desk: Desk) -> None:
    for key in ("infer", "admin"):
        answer = desk.back(key=key)
        assert (answer.status_code, answer.json()["error"]) == (
            403,
            f"scope of the key: found {key}; expected promote",
        )
    assert desk.client.post(PATH).status_code == 401
    assert desk.current().number == 3


def test_it_is_off_unless_it_is_switched_on(store: Store, press: Call, repository: Call, tmp_path: Path) -> None:
    packs = [press(scale_model(1.0))]
    desk = make(store, repository("scale"), packs, tmp_path, rollback=False)
    answer = desk.back()
    assert answer.status_code == 403
    assert "MODELPRESS_SERVING_ROLLBACK=true" in answer.json()["error"]
    assert not ServingSettings().rollback


def test_a_server_that_asks_nobody_lets_nobody(desk: Desk) -> None:
    settings = ServingSettings(poll_seconds=0, workers=1, rollback=True)
    client = TestClient(application(desk.repository, settings, Keyring(Sources()), Audit()))
    assert client.post(PATH).status_code == 403
    assert desk.current().number == 3


def test_a_model_that_is_not_here(desk: Desk) -> None:
    headers = {"Authorization": f"Bearer {desk.keys['promote']}"}
    for name in ("nobody", "scale:processed", "..", "%2e%2e"):
        assert desk.client.post(f"/v2/repository/models/{name}/rollback", headers=headers).status_code == 404


def test_a_pack_that_cannot_be_loaded_any_more_leaves_what_answers(desk: Desk) -> None:
    second, third = desk.packs[1:]
    key = keys.blob(load.load_manifest(desk.store, "scale", second).shards[0].sha256)
    desk.store.put(key, desk.store.get(key)[:-1] + b"\xff")
    answer = desk.back().json()
    assert (answer["pack"], answer["answers"]) == (second, third)
    assert desk.answer() == 3 * WIDTH


def test_an_unloaded_model_stays_out(desk: Desk) -> None:
    desk.repository.unload("scale")
    answer = desk.back().json()
    assert (answer["pack"], answer["answers"]) == (desk.packs[1], None)
    assert desk.repository.model("scale").loaded is None


def test_a_damaged_log_is_told_by_kind(desk: Desk) -> None:
    key = keys.pointer("scale", "champion", 2)
    desk.store.put(key, desk.store.get(key).replace(b"promote", b"rollbak"))
    answer = desk.back()
    assert answer.status_code == 503
    assert "log is damaged" in answer.json()["error"]
    assert "refs" not in answer.text


@pytest.fixture
def readers(open_s3: OpenS3, tmp_path: Path) -> Desk:
    """A server whose credentials may only read, as they should be."""
    writer, reader = open_s3("writer"), open_s3("reader")
    packs = [publish_pack(writer, tmp_path / str(value), scale_model(value), "scale") for value in (1.0, 2.0)]
    repository = Repository(reader, ["scale"], threads=1)
    repository.start()
    return make(reader, repository, packs, tmp_path)


@pytest.mark.s3
def test_credentials_that_only_read_are_said_and_nothing_moves(readers: Desk) -> None:
    answer = readers.back()
    assert answer.status_code == 503
    assert "may only read the store" in answer.json()["error"]
    assert "modelpress rollback scale" in answer.json()["error"]
    assert readers.current().pack == readers.packs[1]
    assert os.environ.get("AWS_ACCESS_KEY_ID", "no key") not in answer.text
    assert readers.lines()[-1]["outcome"] == "failed"


@pytest.fixture
def team(tmp_path: Path) -> Team:
    return Team(tmp_path, farm="publisher")


def test_with_a_trust_file_the_server_signs_or_moves_nothing(team: Team, tmp_path: Path) -> None:
    publisher = team.store("farm")
    packs = [publish_pack(publisher, tmp_path / str(value), scale_model(value), "scale") for value in (1.0, 2.0)]
    for signer, status in ((None, 503), ("farm", 200)):
        store = team.store(signer)
        repository = Repository(store, ["scale"], threads=1)
        repository.start()
        desk = make(store, repository, packs, tmp_path)
        answer = desk.back()
        assert answer.status_code == status
        if signer is None:
            assert "no key that may sign pointers" in answer.json()["error"]
            assert desk.current().pack == packs[1]
    assert desk.current().pack == packs[0]
    assert desk.current().signature is not None
    assert desk.answer() == WIDTH
