"""`sign`, `trust …` and `verify` of a whole store: trust begins, a key is replaced, a key is revoked."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import yaml

from modelpress import keys, load, pointer
from modelpress.errors import TrustError
from modelpress.store import Store, open_store
from tests.cli.conftest import Run


class Desk:
    """One person's environment: a key file, and the team's trust file."""

    def __init__(self, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.run, self._patch = folder, run, monkeypatch
        self.trust = folder / "trust.yaml"
        self.entries: dict[str, dict[str, object]] = {}

    def new_key(self, owner: str, *options: str) -> str:
        code, out, err = self.run("trust", "new-key", str(self.folder / f"{owner}.pem"), "--owner", owner, *options)
        assert code == 0, err
        (entry,) = yaml.safe_load(out)
        self.entries[owner] = entry
        return str(entry["id"])

    def write(self, **changes: object) -> None:
        document = {"format_version": 1, "required": ["publisher"], "pointers": ["publisher"]} | changes
        self.trust.write_text(yaml.safe_dump(document | {"keys": list(self.entries.values())}))

    def sit(self, owner: str | None, *, trusting: bool = True) -> None:
        """Who types from here on."""
        for name, value in (
            ("MODELPRESS_SIGNING_KEY_FILE", str(self.folder / f"{owner}.pem") if owner else None),
            ("MODELPRESS_TRUST", str(self.trust) if trusting else None),
        ):
            if value:
                self._patch.setenv(name, value)
            else:
                self._patch.delenv(name, raising=False)


@pytest.fixture
def desk(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(tmp_path, run, monkeypatch)


def loads(store: Store, pack: str) -> bool:
    try:
        load.load_manifest(open_store(store.uri), "scale", pack)
    except TrustError:
        return False
    return True


def test_trust_begins_a_key_is_replaced_and_revoked(desk: Desk, packs: list[str], store: Store) -> None:
    old = desk.new_key("old")
    desk.write()
    desk.sit(None)
    code, _, err = desk.run("verify", "scale")
    assert (code, "no signature" in err) == (11, True)

    desk.sit("old", trusting=False)  # what stands there is vouched for
    code, out, _ = desk.run("sign", "--all", "--json")
    assert code == 0
    assert {one["outcome"] for one in json.loads(out)} == {"signed"}
    assert len(json.loads(out)) == 3
    desk.sit(None)
    code, out, _ = desk.run("verify", "scale")
    assert code == 0
    assert f"signed by publisher old ({old[:12]})" in out
    assert "signed by publisher old" in desk.run("inspect", "scale")[1]
    assert desk.run("verify")[0] == 0

    new = desk.new_key("new")  # the new key takes over while the old one counts
    desk.write()
    desk.sit("new")
    assert desk.run("sign", "--all")[0] == 0
    code, out, _ = desk.run("sign", "--all", "--json")
    assert {one["outcome"] for one in json.loads(out)} == {"signed before"}
    desk.entries["old"]["revoked"] = "2026-01-01T00:00:00Z"
    desk.write()
    entry = pointer.current(open_store(store.uri), "scale", "champion")
    assert entry is not None
    assert entry.signature is not None
    assert (entry.signature.keyid, entry.pack) == (new, packs[1])
    assert all(loads(store, pack) for pack in packs)

    desk.new_key("third")  # and now one that counted until this moment, in an emergency
    desk.entries["new"]["revoked"] = "2026-01-01T00:00:00Z"
    desk.write()
    assert not any(loads(store, pack) for pack in packs)
    desk.sit("third")
    code, _, err = desk.run("sign", "--all")
    assert (code, "revoked" in err) == (11, True)
    assert not any(loads(store, pack) for pack in packs)
    code, _, err = desk.run("sign", "--all", "--signed-by", new)
    assert code == 0, err
    assert all(loads(store, pack) for pack in packs)
    assert desk.run("verify")[0] == 0


def test_what_another_key_signed_is_left(desk: Desk, packs: list[str], store: Store) -> None:
    old, other = desk.new_key("old"), desk.new_key("other")
    desk.new_key("new")
    desk.write()
    desk.sit("old")
    assert desk.run("sign", f"scale@{packs[0]}")[0] == 0
    desk.entries["old"]["revoked"] = "2026-01-01T00:00:00Z"
    desk.write()
    desk.sit("new")
    code, out, _ = desk.run("sign", "--all", "--signed-by", old, "--json")
    outcomes = {one["what"]: one["outcome"] for one in json.loads(out)}
    assert outcomes == {
        f"scale@{packs[0][:12]}": "signed",
        f"scale@{packs[1][:12]}": "left",
        "scale@champion": "refused",
    }
    assert code == 11  # the alias is not vouched for by anybody
    assert loads(store, packs[0])
    assert not loads(store, packs[1])
    code, _, err = desk.run("sign", "--all", "--signed-by", other[::-1])
    assert (code, "not in the trust file" in err) == (2, True)


def test_a_damaged_pack_is_not_signed(desk: Desk, packs: list[str], store: Store) -> None:
    desk.new_key("farm")
    desk.write()
    desk.sit("farm")
    key = keys.blob(load.load_manifest(store, "scale", packs[0]).shards[0].sha256)
    data = store.get(key)
    store.put(key, data[:-1] + bytes([data[-1] ^ 1]))
    assert desk.run("sign", f"scale@{packs[0]}")[0] == 7
    assert not loads(store, packs[0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "neither"),
        (["scale", "--all"], "both"),
        (["scale", "--signed-by", "x"], "--signed-by alone"),
        (["scale"], "no key to sign with"),
        (["--all"], "no key to sign with"),
    ],
)
def test_what_to_sign_is_said_plainly(desk: Desk, packs: list[str], arguments: list[str], said: str) -> None:
    code, _, err = desk.run("sign", *arguments)
    assert (code, said in err) == (2, True)


def test_a_key_is_made_only_with_legal_words(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = desk.run("trust", "new-key", str(desk.folder / "k.pem"), "--owner", "x", "--role", "The Boss")
    assert (code, "role" in err) == (2, True)
    assert not (desk.folder / "k.pem").exists()
    monkeypatch.setenv("MODELPRESS_SIGNING_KEY_PASSPHRASE", "correct horse")
    desk.new_key("farm", "--role", "approver", "--packs", "digits", "--packs", "team-*")
    assert stat.S_IMODE((desk.folder / "farm.pem").stat().st_mode) == 0o600
    assert b"ENCRYPTED" in (desk.folder / "farm.pem").read_bytes()
    assert desk.entries["farm"]["packs"] == ["digits", "team-*"]
    desk.write(required=["approver"], pointers=["approver"])
    desk.sit(None)
    code, out, _ = desk.run("trust", "show")
    assert code == 0
    assert "digits, team-*" in out
    assert "counts" in out
    desk.sit(None, trusting=False)
    assert desk.run("trust", "show")[0] == 2


def test_a_cut_log_is_refused_until_it_is_forgotten(desk: Desk, packs: list[str], store: Store) -> None:
    desk.new_key("farm")
    desk.write()
    desk.sit("farm", trusting=False)
    desk.run("sign", "--all")
    desk.sit(None)
    assert desk.run("verify", "scale")[0] == 0
    for number in (3, 2):
        store.delete(keys.pointer("scale", "champion", number))
    code, _, err = desk.run("verify", "scale")
    assert (code, "the signature" in err or "entry 3" in err) == (11, True)  # the first entry was never signed
    desk.sit("farm", trusting=False)
    pointer.append(open_store(store.uri), "scale", "champion", packs[0], "promote")
    desk.sit(None)
    code, _, err = desk.run("verify", "scale")
    assert (code, "modelpress trust forget" in err) == (7, True)
    assert "forgotten" in desk.run("trust", "forget", "scale")[1]
    assert desk.run("verify", "scale")[0] == 0
    assert "nothing was kept" in desk.run("trust", "forget", "scale", "--alias", "canary")[1]


def test_a_whole_store_is_verified(desk: Desk, packs: list[str], store: Store) -> None:
    folder = store.uri.removeprefix("file://")
    code, out, _ = desk.run("verify", folder)
    assert code == 0
    assert "not asked for" in out
    assert desk.run("verify", folder, f"scale@{packs[0]}")[0] == 0
    assert "not checked" in desk.run("verify", "scale")[1]
    store.put("packs/scale/notes", b"x")
    code, out, err = desk.run("verify", "--json")
    assert (code, json.loads(out)["errors"]) == (7, 1)
    assert "foreign packs/scale/notes" in err


def test_a_stolen_keys_entry_is_left_by_a_rollback(desk: Desk, packs: list[str], store: Store) -> None:
    stolen = desk.new_key("stolen")
    desk.new_key("new")
    desk.write()
    desk.sit("stolen", trusting=False)
    desk.run("sign", "--all")  # as the thief: the alias stays at the second pack
    desk.entries["stolen"]["revoked"] = "2026-01-01T00:00:00Z"
    desk.write()
    desk.sit("new")
    assert desk.run("sign", f"scale@{packs[0]}")[0] == 0
    back = ["rollback", "scale", "--to", packs[0], "--pointer-only"]
    assert desk.run(*back)[0] == 11
    assert desk.run("rollback", "scale", "--signed-by", stolen)[0] == 2
    code, _, err = desk.run(*back, "--signed-by", stolen)
    assert code == 0, err
    assert packs[0] in desk.run("verify", "scale")[1]
    assert desk.run("rollback", "scale", "--to", packs[1], "--pointer-only")[0] == 11  # no good key signed that pack
