"""Where wrapping keys come from: files, the environment, KMS over HTTP; and what is said when one cannot be had."""

from __future__ import annotations

import base64
import json
import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modelpress import keys
from modelpress.cipher import LocalKey, secrets, wrapping_keys
from modelpress.cipher.wrapping import make_key_file
from modelpress.errors import (
    AccessDeniedError,
    ConfigError,
    CorruptionError,
    EncryptionKeyError,
    NotFoundError,
    StoreUnavailableError,
)
from modelpress.manifest import canonical_json
from modelpress.settings import Settings
from modelpress.store import Store, open_store
from modelpress.store.kms import KmsKey
from tests.cipher.kms_server import ACCOUNT, KmsServer

PUBLISHER, SERVER, NOBODY = "AKIAPUBLISHER", "AKIASERVER", "AKIANOBODY"
Configured = Callable[..., list[KmsKey]]


def settings_of(**values: object) -> Settings:
    return Settings.model_validate({"s3_attempts": 2, "s3_timeout_seconds": 5, **values})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def kms(monkeypatch: pytest.MonkeyPatch) -> Iterator[KmsServer]:
    server = KmsServer()
    server.rights = {PUBLISHER: {"Encrypt", "Decrypt"}, SERVER: {"Decrypt"}}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", PUBLISHER)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    yield server
    server.close()


@pytest.fixture
def configured(kms: KmsServer) -> Configured:
    def configured(key_id: str = "alias/one", **more: object) -> list[KmsKey]:
        return wrapping_keys(settings_of(kms_key_id=key_id, kms_endpoint_url=kms.endpoint, **more))  # type: ignore[return-value]

    return configured


def test_keys_of_files_come_before_those_of_the_environment_and_none_is_shown(tmp_path: Path) -> None:
    ids = [make_key_file(tmp_path / name) for name in ("new", "old")]
    text = base64.b64encode(b"E" * 32).decode()
    settings = settings_of(key_file=f"{tmp_path / 'new'}:{tmp_path / 'old'}", key=text)
    found = wrapping_keys(settings)
    assert [key.id for key in found if isinstance(key, LocalKey)] == [*ids, LocalKey(b"E" * 32).id]
    assert text not in repr(settings) + str(settings) + settings.model_dump_json() + repr(found)
    assert wrapping_keys(settings_of()) == []


def test_a_key_file_is_its_owners_alone_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key"
    make_key_file(path)
    kept = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="give another path"):
        make_key_file(path)
    assert path.read_bytes() == kept


@pytest.mark.parametrize("text", ["", "short", base64.b64encode(b"x" * 31).decode(), "not/base64!" * 4, "A" * 5000])
def test_what_is_no_key_is_refused_without_being_shown(tmp_path: Path, text: str) -> None:
    path = tmp_path / "key"
    path.write_text(text)
    with pytest.raises(ConfigError) as of_file:
        wrapping_keys(settings_of(key_file=str(path)))
    assert str(path) in str(of_file.value)
    assert not text or text not in str(of_file.value)
    if text:
        with pytest.raises(ConfigError) as of_environment:
            wrapping_keys(settings_of(key=text))
        assert "MODELPRESS_KEY" in str(of_environment.value)
        assert text not in str(of_environment.value)


def test_a_key_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        wrapping_keys(settings_of(key_file=str(tmp_path / "nowhere")))


def test_kms_wraps_and_opens_and_never_sees_a_blob(
    store: Store, kms: KmsServer, configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = secrets.current(store, "demo", configured())
    (entry,) = secrets.history(store, "demo")
    assert (entry.algorithm, entry.key) == ("aws-kms", f"{ACCOUNT}one-0000")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", SERVER)
    assert secrets.find(store, "demo", made[0], configured()) == made[1]
    assert {request["EncryptionContext"]["modelpress:name"] for _, request in kms.requests} == {"demo"}
    sent = [base64.b64decode(request["Plaintext"]) for name, request in kms.requests if name == "Encrypt"]
    assert sent == [made[1]]


def test_blank_places_in_the_list_of_kms_keys_are_no_keys(store: Store, configured: Configured) -> None:
    assert [str(key) for key in configured(" alias/one, ,")] == ["aws-kms key alias/one"]
    assert configured(" , ") == []
    secrets.current(store, "demo", configured("alias/two,"))
    with pytest.raises(EncryptionKeyError, match="alias/one"):  # and not that KMS is not to be reached
        secrets.current(store, "demo", configured("alias/one,"))


def test_what_kms_wraps_and_opens_reaches_no_log(
    store: Store, configured: Configured, caplog: pytest.LogCaptureFixture
) -> None:
    """botocore logs the bodies of requests and answers at level DEBUG."""
    caplog.set_level(logging.DEBUG)
    made = secrets.current(store, "demo", configured())
    secrets.find(store, "demo", made[0], configured())
    assert "TrentService.Decrypt" not in caplog.text
    assert base64.b64encode(made[1]).decode() not in caplog.text
    assert repr(made[1])[2:-1] not in caplog.text
    caplog.clear()
    logging.getLogger("botocore.endpoint").debug("of another request")
    assert "of another request" in caplog.text


def test_a_server_may_open_and_not_wrap(store: Store, configured: Configured, monkeypatch: pytest.MonkeyPatch) -> None:
    made = secrets.current(store, "demo", configured())
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", SERVER)
    with pytest.raises(AccessDeniedError, match="kms:Encrypt"):
        secrets.renew(store, "demo", configured())
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", NOBODY)
    with pytest.raises(AccessDeniedError, match="kms:Decrypt"):
        secrets.find(store, "demo", made[0], configured())
    assert len(secrets.history(store, "demo")) == 1


def test_rotation_from_one_kms_key_to_another_and_to_a_file(
    store: Store, kms: KmsServer, configured: Configured, tmp_path: Path
) -> None:
    made = secrets.current(store, "demo", configured("alias/one"))
    entry = secrets.rewrap(store, "demo", configured("alias/two,alias/one"))
    assert (entry.number, entry.key) == (2, f"{ACCOUNT}two-0000")
    assert secrets.rewrap(store, "demo", configured("alias/two,alias/one")).number == 2
    assert secrets.find(store, "demo", made[0], configured("alias/one")) == made[1], "by the entry before"
    make_key_file(tmp_path / "key")
    local = wrapping_keys(settings_of(key_file=str(tmp_path / "key")))
    secrets.rewrap(store, "demo", [*local, *configured("alias/two")])
    secrets.forget(store, "demo", local)
    del kms.keys["one"], kms.keys["two"]
    assert secrets.find(store, "demo", made[0], local) == made[1]


def test_an_entry_that_names_a_key_of_a_stranger_is_not_opened_by_it(store: Store, configured: Configured) -> None:
    """Whoever can write to the store could wrap a secret that they know with a key that our credentials may use."""
    secrets.current(store, "demo", configured("alias/two"))
    with pytest.raises(EncryptionKeyError, match="alias/one"):
        secrets.current(store, "demo", configured("alias/one"))


def test_every_way_that_kms_fails_has_its_error(
    store: Store, kms: KmsServer, configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = secrets.current(store, "demo", configured())
    kms.failing = 1
    assert secrets.find(store, "demo", made[0], configured()) == made[1], "repeated"
    kms.failing = 100
    with pytest.raises(StoreUnavailableError, match="run it again"):
        secrets.find(store, "demo", made[0], configured())
    kms.failing = 0
    with pytest.raises(AccessDeniedError, match="NotFoundException"):
        secrets.find(store, "demo", made[0], configured("alias/unknown"))
    key = keys.secret("demo", 1)
    entry = json.loads(store.get(key))
    blob = bytearray(base64.b64decode(entry["wrapped"]))
    blob[-1] ^= 1
    store.put(key, canonical_json(entry | {"wrapped": base64.b64encode(blob).decode()}))
    with pytest.raises(CorruptionError, match="modelpress:name demo"):
        secrets.find(store, "demo", made[0], configured())
    kms.close()
    with pytest.raises(StoreUnavailableError, match="MODELPRESS_KMS_ENDPOINT_URL"):
        secrets.find(store, "demo", made[0], configured())
    with pytest.raises(ConfigError, match="MODELPRESS_KMS_ENDPOINT_URL"):
        wrapping_keys(settings_of(kms_key_id="x", kms_endpoint_url="no address"))


def test_without_credentials_kms_is_not_asked(
    store: Store, kms: KmsServer, configured: Configured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(AccessDeniedError, match="AWS_ACCESS_KEY_ID"):
        secrets.current(store, "demo", configured())
    assert kms.requests == []
