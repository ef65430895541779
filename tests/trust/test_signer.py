"""Key files: who may read them, and what they may hold."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from modelpress.errors import ConfigError, TrustFileError
from modelpress.settings import Settings
from modelpress.store import open_store
from modelpress.trust import Signer, new_key, read_policy
from tests.trust.teams import Team


def test_a_new_key_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    made = new_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    loaded = Signer.load(path)
    assert (loaded.key_id, loaded.public_key) == (made.key_id, made.public_key)
    assert loaded.envelope("t", b"x") == made.envelope("t", b"x")
    with pytest.raises(ConfigError, match="never written over"):
        new_key(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_a_key_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    new_key(path := tmp_path / "key.pem")
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o}"):
        Signer.load(path)


def test_a_passphrase(tmp_path: Path) -> None:
    made = new_key(path := tmp_path / "key.pem", "correct horse")
    assert b"ENCRYPTED" in path.read_bytes()
    assert Signer.load(path, "correct horse").key_id == made.key_id
    for wrong, said in (("battery", "a wrong passphrase"), ("", "none given")):
        with pytest.raises(ConfigError, match=said) as caught:
            Signer.load(path, wrong)
        assert "battery" not in str(caught.value)
    new_key(plain := tmp_path / "plain.pem")
    with pytest.raises(ConfigError, match="a key that has none"):
        Signer.load(plain, "correct horse")


def test_a_file_that_holds_no_such_key(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    with pytest.raises(ConfigError, match="trust new-key"):
        Signer.load(path)
    other = ec.generate_private_key(ec.SECP256R1())
    for content in (b"", b"text", other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(ConfigError, match="Ed25519"):
            Signer.load(path)


def test_openssl_makes_keys_too(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    made = subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519"], check=True, capture_output=True).stdout
    path.touch(0o600)
    path.write_bytes(made)
    public = subprocess.run(
        ["openssl", "pkey", "-in", str(path), "-pubout"], check=True, capture_output=True, text=True
    ).stdout
    assert Signer.load(path).public_key == public.splitlines()[1]


def test_a_store_is_opened_with_the_trust_and_the_key_of_the_settings(team: Team) -> None:
    values = {"home": team.folder, "trust": team.path, "signing_key_file": team.folder / "farm.pem"}
    store = open_store(str(team.folder / "store"), Settings.model_validate(values))
    assert store.trust is not None
    assert store.trust.policy() == read_policy(team.path)
    assert store.signer is not None
    assert store.signer.key_id == team.signers["farm"].key_id
    secret = Settings.model_validate(values | {"signing_key_passphrase": "correct horse"})
    assert "horse" not in repr(secret) + str(secret.model_dump())
    with pytest.raises(ConfigError, match="a key that has none"):
        open_store(str(team.folder), secret)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"requird": ["publisher"]}, "requird"),
        ({"required": []}, "required"),
        ({"required": ["publishers"]}, "role 'publishers' is asked for, and no key has it"),
        ({"format_version": 2}, "format_version"),
        ({"keys": []}, "keys"),
        ({"keys": "all"}, "keys"),
    ],
)
def test_a_trust_file_with_a_slip(team: Team, fields: dict[str, object], said: str) -> None:
    team.set(**fields)
    with pytest.raises(TrustFileError, match=said):
        read_policy(team.path)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"id": "0" * 64}, "the public key has the id"),
        ({"public_key": "MCow"}, "not the base64 of a public key"),
        ({"packs": []}, "packs"),
        ({"packs": ["../x"]}, "packs"),
        ({"valid_until": "2027-01-01"}, "timezone"),
        ({"valid_until": "2027-01-01T00:00:00"}, "timezone"),
        ({"valid_from": "2027-01-01T00:00:00Z", "valid_until": "2026-01-01T00:00:00Z"}, "not after valid_from"),
        ({"revoked": "soon"}, "revoked"),
        ({"revoked": None}, "revoked: nothing behind it"),
        ({"valid_until": None}, "valid_until: nothing behind it"),
        ({"expires": "2027-01-01T00:00:00Z"}, "expires"),
    ],
)
def test_a_key_of_a_trust_file_with_a_slip(team: Team, fields: dict[str, object], said: str) -> None:
    team.change("farm", **fields)
    with pytest.raises(TrustFileError, match=said):
        read_policy(team.path)


@pytest.mark.parametrize(
    "text", ["", "[", "- 1", "a: &a [*a]", "required: [x]\nrequired: [y]", "\0", "a: !!python/object:os.system x"]
)
def test_a_trust_file_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trust.yaml"
    path.write_text(text)
    with pytest.raises(TrustFileError):
        read_policy(path)


def test_a_trust_file_that_everyone_may_change(team: Team) -> None:
    team.path.chmod(0o666)
    with pytest.raises(TrustFileError, match="everyone may change"):
        read_policy(team.path)
    with pytest.raises(TrustFileError, match="a file that can be read"):
        read_policy(team.folder / "none.yaml")


def test_dates_are_written_as_in_the_documents(team: Team) -> None:
    until = "  role: publisher\n  valid_until: 2027-12-31T00:00:00Z\n"
    text = team.path.read_text().replace("  role: publisher\n", until)
    team.path.write_text(text)
    key = read_policy(team.path).keys[0]
    assert key.valid_until is not None
    assert key.valid_until.isoformat() == "2027-12-31T00:00:00+00:00"
    team.path.write_text(text.replace("2027-12-31T00:00:00Z", "2027-12-31"))
    with pytest.raises(TrustFileError, match="valid_until"):
        read_policy(team.path)


def test_a_key_stands_once(team: Team) -> None:
    team.set(keys=team.document["keys"] * 2)
    with pytest.raises(TrustFileError, match="stands 2 times"):
        read_policy(team.path)


def test_the_passphrase_is_read_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_key(path := tmp_path / "key.pem", "correct horse")
    monkeypatch.setitem(os.environ, "MODELPRESS_SIGNING_KEY_FILE", str(path))
    monkeypatch.setitem(os.environ, "MODELPRESS_SIGNING_KEY_PASSPHRASE", "correct horse")
    assert open_store(str(tmp_path)).signer is not None
