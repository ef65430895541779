"""A server with a trust file: what is not vouched for never answers, and what answers goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

from modelpress import keys, pointer
from modelpress.canary import log as canary_log
from modelpress.errors import LogCutError, TrustError, UnsignedError
from modelpress.pointer import Pointer
from modelpress.store import Store
from serving.app import create_app
from serving.canary import Canaries
from serving.repository import Repository
from tests.canary.states import config, state
from tests.serving.conftest import Server, scale_model
from tests.serving.test_repository import answer, row
from tests.trust.teams import Team

Call = Callable[..., str]


@pytest.fixture
def team(tmp_path: Path) -> Team:
    return Team(tmp_path, farm="publisher")


@pytest.fixture
def store(team: Team) -> Store:
    """As the publisher opens it: what `press` puts there is signed."""
    return team.store("farm")


@pytest.fixture
def served(team: Team, press: Call) -> Repository:
    """A server, as it starts, that follows `scale@champion`, which went from 2 to 3."""
    press(scale_model(2.0))
    press(scale_model(3.0))
    return restarted(team)


def restarted(team: Team) -> Repository:
    """A server with nothing in its memory."""
    repository = Repository(team.store(), ["scale"], threads=1, retry_seconds=0.0)
    repository.start()
    return repository


@pytest.fixture
def client(served: Repository) -> Iterator[TestClient]:
    with TestClient(create_app(served, poll_seconds=0, workers=1)) as client:
        yield client


def log(store: Store) -> list[Pointer]:
    return pointer.history(store.held_to(None), "scale", "champion")


def write(store: Store, entry: Pointer) -> None:
    store.put(keys.pointer("scale", "champion", entry.number), entry.to_bytes())


def replay(store: Store) -> None:
    """The first pack again, which is validly signed, by an entry that an attacker can write."""
    first, last = log(store)
    changes = {"number": 3, "previous": last.digest, "format_version": 1, "signature": None}
    write(store, first.model_copy(update=changes))


def replay_signed(store: Store) -> None:
    first, last = log(store)
    write(store, first.model_copy(update={"number": 3, "previous": last.digest}))


def cut(store: Store) -> None:
    store.delete(keys.pointer("scale", "champion", 2))


def emptied(store: Store) -> None:
    for number in (1, 2):
        store.delete(keys.pointer("scale", "champion", number))


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        (replay, "a signature is missing"),
        (replay_signed, "a signature is not what it should be"),
        (cut, "lost or changed an entry"),
        (emptied, "lost or changed an entry"),
    ],
)
def test_a_replayed_pointer_swaps_nothing_and_the_index_says_why(
    team: Team, store: Store, served: Repository, client: TestClient, attack: Callable[[Store], None], reason: str
) -> None:
    attack(store)
    served.poll()
    assert answer(served) == 3.0
    assert client.get("/v2/health/ready").status_code == 200
    assert client.get("/v2/models/scale/ready").json() == {"name": "scale", "ready": True}
    (shown,) = client.post("/v2/repository/index").json()
    assert shown["state"] == "READY"
    assert reason in shown["reason"]
    assert reason in client.get("/v2/models/scale").json()["parameters"]["failure"]
    with pytest.raises((TrustError, LogCutError)):  # nor does a server that starts now take it
        restarted(team)
    served.unload("scale")
    with pytest.raises((TrustError, LogCutError)):  # anybody may ask to unload; it forgets nothing
        served.load("scale")


def test_what_was_seen_can_be_forgotten_while_it_serves(team: Team, store: Store, served: Repository) -> None:
    cut(store)
    served.poll()
    assert answer(served) == 3.0
    store.trust.seen.forget(store.uri, "scale", "champion")  # type: ignore[union-attr]
    served.unload("scale")
    served.load("scale")
    assert answer(served) == 2.0
    assert answer(restarted(team)) == 2.0


def test_a_pack_without_a_signature_never_answers(team: Team, store: Store, served: Repository, press: Call) -> None:
    signer, store.signer = store.signer, None
    store.trust = None
    unsigned = press(scale_model(5.0), alias=None)
    store.signer = signer  # the entry is signed, the pack is not
    pointer.append(store, "scale", "champion", unsigned, "promote")
    served.poll()
    assert answer(served) == 3.0
    assert row(served)["reason"] == "pointer 3 can't be loaded: a signature is missing"
    with pytest.raises(UnsignedError):
        restarted(team)


def test_a_revoked_key_is_told_and_what_answers_goes_on(team: Team, store: Store, served: Repository) -> None:
    new = team.add("new-farm")
    team.change("farm", revoked="2026-01-01T00:00:00Z")
    served.poll()
    assert answer(served) == 3.0
    assert "signed by a key that does not count" in row(served)["reason"]
    other = team.store("new-farm")
    last = log(other)[-1]
    next_entry = last.model_copy(update={"number": 3, "previous": last.digest, "format_version": 1, "signature": None})
    write(other, next_entry.signed(new))  # the pointer counts again, its pack does not yet
    served.poll()
    assert row(served)["reason"] == "pointer 3 can't be loaded: it is signed by a key that does not count"
    assert answer(served) == 3.0
    from modelpress.trust import sign_pack

    sign_pack(other, new, "scale", last.pack)
    served.poll()
    assert "reason" not in row(served)


def test_a_key_that_expires_while_it_serves_is_told(
    team: Team, store: Store, press: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file does not change, and the pointer is by another key that goes on counting."""
    moment = datetime.now(UTC)
    anna = team.add("anna", "approver")
    team.change("farm", valid_until=(moment + timedelta(hours=1)).isoformat())
    team.set(pointers=["approver"])
    pack = press(scale_model(3.0), alias=None)
    store.signer = anna
    pointer.append(store, "scale", "champion", pack, "promote")
    served = restarted(team)
    served.poll()
    assert "reason" not in row(served)
    for module in ("packs", "entries", "trusted"):
        monkeypatch.setattr(f"modelpress.trust.{module}.now", lambda: moment + timedelta(hours=2))
    served.poll()
    assert answer(served) == 3.0
    assert row(served)["reason"] == "pointer 1 can't be loaded: it is signed by a key that does not count"


def test_a_broken_trust_file_stops_nothing_that_answers(team: Team, served: Repository) -> None:
    kept = team.path.read_text()
    team.path.write_text("keys: []")
    served.poll()
    assert answer(served) == 3.0
    assert row(served)["reason"] == "the pointer can't be read: the server's trust file can't be used"
    team.path.write_text(kept)
    served.poll()
    assert "reason" not in row(served)


def test_a_real_server_starts_with_a_trust_file_and_refuses_after_a_restart(
    team: Team, store: Store, press: Call, serve: Callable[..., Server]
) -> None:
    press(scale_model(2.0))
    newest = press(scale_model(3.0))
    environment = {"MODELPRESS_TRUST": str(team.path), "MODELPRESS_HOME": str(team.folder / "home")}
    server = serve("scale", **environment)
    assert httpx.get(f"{server.url}/v2/models/scale").json()["versions"] == [newest]
    assert server.stop() == 0
    cut(store)
    with pytest.raises(AssertionError, match="which was seen here before"):
        serve("scale", **environment)


def test_a_canary_that_nobody_vouches_for_sends_nobody_anywhere(team: Team, press: Call) -> None:
    first, second = press(scale_model(2.0)), press(scale_model(3.0), alias=None)
    made = state(0, config({"mode": "canary", "share": 0.9}), champion=first, candidate=second)
    stranger = team.store(trusting=False)
    repository = restarted(team)
    canaries = Canaries(team.store(), repository, poll_seconds=0)
    canary_log.write(stranger, "scale", made, 0, first)
    canaries.poll()
    assert canaries.shown("scale") is None
    assert not repository.model("scale").held
    # Signed, by a log that begins anew: the same entry counts.
    (entry,) = list(stranger.list(keys.pointers("scale", "canary")))
    stranger.delete(entry.key)
    canary_log.write(team.store("farm"), "scale", made, 0, first)
    canaries.poll()
    assert set(repository.model("scale").held) == {second}
