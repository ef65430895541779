"""Promotion over HTTP: only to what the gate let through against the pack that stands, once it is loaded here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from modelpress import decisions, keys, load, pointer
from modelpress.access import KeyFile, new_key
from modelpress.reports import Check, Decision, Override
from modelpress.store import Store
from serving.audit import Audit
from serving.keyring import Keyring, Sources
from serving.main import ServingSettings, application
from serving.repository import Repository
from tests.serving.conftest import publish_pack, scale_model
from tests.serving.test_repository import answer
from tests.trust.teams import Team

Call = Callable[..., Any]
PATH = "/v2/repository/models/scale/promote"
CHECK = Check(name="quality", verdict="pass", reason="0.98 against 0.97")
PASSED = Decision(promote=True, verdict="pass", reasons=["quality: pass"], checks=[CHECK])
REFUSED = PASSED.model_copy(update={"promote": False, "verdict": "fail", "reasons": ["quality: fail"]})
FORCED = REFUSED.model_copy(update={"promote": True, "override": Override(by="Anna", reason="it is Friday")})


@dataclass
class Desk:
    """A server over a champion and a candidate that nobody judged yet."""

    client: TestClient
    store: Store
    repository: Repository
    champion: str
    candidate: str
    keys: dict[str, str]
    audit: Path

    def promote(self, pack: str | None = None, *, key: str = "promote", **body: str) -> httpx.Response:
        asked = {"pack": pack or self.candidate} | body
        return self.client.post(PATH, json=asked, headers={"Authorization": f"Bearer {self.keys[key]}"})

    def judge(
        self, decision: Decision = PASSED, store: Store | None = None, alias: str = "champion", **more: Any
    ) -> decisions.Record:
        usual: dict[str, Any] = {"champion": self.champion, "after": 1, "gate": {}}
        return decisions.keep(store or self.store, "scale", self.candidate, alias, decision, **usual | more)

    def current(self) -> pointer.Pointer:
        found = pointer.current(self.store, "scale", "champion")
        assert found is not None
        return found

    def refused(self, words: str, **body: str) -> None:
        found = self.promote(**body)
        assert (found.status_code, words in found.json()["error"]) == (409, True), found.text
        assert (self.current().pack, self.current().number) == (self.champion, 1), "nothing moved"
        assert list(self.repository.model("scale").held) == [], "nothing stays in memory"
        assert json.loads(self.audit.read_text().splitlines()[-1])["why"] == found.json()["error"]


def make(store: Store, packs: tuple[str, str], folder: Path, *, promote: bool = True) -> Desk:
    repository = Repository(store, ["scale"], threads=1)
    repository.start()
    made = {scope: new_key(scope, [scope], None, datetime.now(UTC)) for scope in ("promote", "infer", "admin")}
    (folder / "keys.json").write_bytes(KeyFile(keys=tuple(key for _, key in made.values())).to_bytes())
    settings = ServingSettings(poll_seconds=0, workers=1, promote=promote)
    guard = application(repository, settings, Keyring(Sources(folder / "keys.json")), Audit(folder / "audit.jsonl"))
    given = {scope: text for scope, (text, _) in made.items()}
    return Desk(TestClient(guard), store, repository, *packs, given, folder / "audit.jsonl")


@pytest.fixture
def desk(store: Store, press: Call, tmp_path: Path) -> Desk:
    return make(store, (press(scale_model(2.0)), press(scale_model(3.0), alias=None)), tmp_path)


def test_what_the_gate_let_through_answers_at_once(desk: Desk) -> None:
    record = desk.judge()
    found = desk.promote()
    assert (found.status_code, found.json()) == (
        200,
        {
            "name": "scale",
            "alias": "champion",
            "pack": desk.candidate,
            "pointer": 2,
            "before": desk.champion,
            "answers": desk.candidate,
        },
    )
    assert answer(desk.repository) == 3.0
    assert list(desk.repository.model("scale").held) == []
    entry = desk.current()
    assert (entry.pack, entry.reason, entry.number) == (desk.candidate, "promote", 2)
    assert entry.decision == PASSED.model_dump(mode="json") | {"record": record.digest}
    assert entry.who.startswith(f"promote (key {desk.keys['promote'].split('_')[1]}) by ")
    (line,) = [json.loads(line) for line in desk.audit.read_text().splitlines()]
    assert (line["action"], line["status"], line["pack"], line["before"]) == (
        "promote",
        200,
        desk.candidate,
        desk.champion,
    )


def test_an_override_by_name_counts_and_says_so(desk: Desk) -> None:
    desk.judge(FORCED)
    assert desk.promote().status_code == 200
    assert desk.current().reason == "override"
    assert (desk.current().decision or {})["override"]["by"] == "Anna"


def test_what_nobody_judged_is_not_served(desk: Desk) -> None:
    desk.refused("--judge-only")


def test_the_newest_decision_counts(desk: Desk) -> None:
    desk.judge(PASSED)
    desk.judge(REFUSED)
    desk.refused("found fail")


def test_a_pass_for_another_alias_is_none_for_this(desk: Desk) -> None:
    desk.judge(alias="staging")
    desk.refused("found none")


def test_a_pass_of_another_pack_is_none_of_this(desk: Desk, press: Call) -> None:
    other = press(scale_model(9.0), alias=None)
    decisions.keep(desk.store, "scale", other, "champion", PASSED, champion=desk.champion, after=1, gate={})
    desk.refused("found none")


def test_a_pass_against_another_champion_is_old(desk: Desk) -> None:
    desk.judge(champion="9" * 64)
    desk.refused("which stands")


def test_a_refusal_that_somebody_deleted_lets_nothing_through(desk: Desk) -> None:
    desk.judge(PASSED)
    refusal = desk.judge(REFUSED)
    desk.judge(PASSED)
    desk.store.delete(keys.decision("scale", desk.candidate, refusal.digest))
    desk.refused("one was deleted")


def test_a_pack_whose_bytes_are_not_what_was_judged_moves_nothing(desk: Desk) -> None:
    desk.judge()
    key = keys.blob(load.load_manifest(desk.store, "scale", desk.candidate).shards[0].sha256)
    desk.store.put(key, desk.store.get(key)[:-1] + b"\xff")
    desk.refused("its bytes are not what the manifest says")
    assert answer(desk.repository) == 2.0


def test_a_page_that_is_old_and_a_pack_that_stands_move_nothing(desk: Desk) -> None:
    desk.judge()
    desk.refused("as the request says", **{"from": desk.candidate})
    desk.refused("already", pack=desk.champion)


def test_a_retry_moves_nothing_more(desk: Desk) -> None:
    desk.judge()
    first, again = (desk.promote(token="0123456789abcdef") for _ in range(2))
    assert (first.status_code, again.json()) == (200, first.json())
    assert desk.current().number == 2


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'{"pack": "1f0c"}', b'{"pack": null}', b'{"to": "x"}', b"{"])
def test_another_body_is_refused(desk: Desk, body: bytes) -> None:
    desk.judge()
    found = desk.client.post(PATH, content=body, headers={"Authorization": f"Bearer {desk.keys['promote']}"})
    assert found.status_code == 400
    assert desk.current().number == 1


def test_nobody_else_may_and_nobody_where_it_is_off(desk: Desk, tmp_path: Path) -> None:
    desk.judge()
    for key in ("infer", "admin"):
        assert desk.promote(key=key).status_code == 403
    assert desk.client.post(PATH, json={"pack": desk.candidate}).status_code == 401
    closed = make(desk.store, (desk.champion, desk.candidate), tmp_path, promote=False).promote()
    assert closed.status_code == 403
    assert "MODELPRESS_SERVING_PROMOTE=true" in closed.json()["error"]
    assert not ServingSettings().promote
    assert desk.current().number == 1


def test_with_a_trust_file_only_a_signed_decision_counts(tmp_path: Path) -> None:
    team = Team(tmp_path, farm="publisher", anna="approver")
    store = team.store("farm")
    first, second = (publish_pack(store, tmp_path / str(n), scale_model(n), "scale", None) for n in (2.0, 3.0))
    pointer.append(store, "scale", "champion", first, "promote")
    desk = make(store, (first, second), tmp_path)
    desk.judge(store=team.store())
    desk.refused("no signature")
    desk.judge(store=team.store("anna"))
    desk.refused("none that counts")
    desk.judge()
    assert desk.promote().status_code == 200
    assert desk.current().signature is not None
