"""Encrypted packs: published, verified, loaded and pulled like others with the key, and in no way without."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import Buffer

from modelpress import cli, keys, load
from modelpress.cipher import LocalKey, seal_pack, secrets
from modelpress.errors import CorruptionError, EncryptionKeyError, SetupError, StageError
from modelpress.manifest import Manifest, canonical_json
from modelpress.publish import publish
from modelpress.store import Store, open_store
from modelpress.store.local import LocalStore
from modelpress.store.receive import memory
from tests.packs import Pack, assert_same, make_pack, torch_checkpoint

KEY = LocalKey(b"K" * 32)
TEXT = base64.b64encode(b"K" * 32).decode()
SEGMENT = 4000


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("MODELPRESS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELPRESS_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MODELPRESS_KEY", TEXT)
    return open_store(str(tmp_path / "store"))


def encrypted(store: Store, folder: Path, pack: Pack, segment_bytes: int = SEGMENT) -> Pack:
    secret = secrets.current(store, "demo", [KEY])
    manifest, shards, blobs = seal_pack(
        pack.manifest, pack.shards, pack.blobs, secret, folder, segment_bytes=segment_bytes
    )
    return Pack(manifest, shards, blobs, pack.checkpoint)


@pytest.fixture
def pack(store: Store, tmp_path: Path) -> Pack:
    """Published, encrypted."""
    made = encrypted(store, tmp_path / "sealed", make_pack(tmp_path / "shards"))
    made.publish(store)
    return made


def test_it_loads_bit_for_bit_with_the_key_and_not_without(
    store: Store, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, found = load.load_checkpoint(store, "demo", pack.digest)
    assert_same(found, pack.checkpoint)
    assert manifest.format_version == 3
    assert load.verify(store, "demo", pack.digest).pack == pack.digest
    load.pull(store, "demo", pack.digest, tmp_path / "pulled")
    assert (tmp_path / "pulled" / "config.json").read_bytes() == pack.checkpoint.files["config.json"]
    monkeypatch.delenv("MODELPRESS_KEY")
    with pytest.raises(EncryptionKeyError, match="MODELPRESS_KEY_FILE"):
        load.load_checkpoint(store, "demo", pack.digest)
    with pytest.raises(EncryptionKeyError):
        load.pull(store, "demo", pack.digest, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    monkeypatch.setenv("MODELPRESS_KEY", base64.b64encode(b"L" * 32).decode())
    with pytest.raises(EncryptionKeyError, match=KEY.id):
        load.verify(store, "demo", pack.digest)


def test_nothing_of_the_model_can_be_seen_in_the_blobs(store: Store, pack: Pack) -> None:
    whole = b"".join(store.get(keys.blob(digest)) for digest in pack.manifest.blobs())
    for plain in (b'"hidden"', b"word\nword", b"safetensors", b"__metadata__", b"layer.0", b"F32", b"\x28\xb5\x2f\xfd"):
        assert plain not in whole
    assert len(zlib.compress(whole, 9)) > len(whole), "it looks like noise"
    assert all(entry.plain for entry in [*pack.manifest.shards, *pack.manifest.blob_files()])


def test_blobs_are_verified_without_a_key(store: Store, pack: Pack) -> None:
    for digest, size in pack.manifest.blobs().items():
        data = store.get(keys.blob(digest))
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (digest, size)


def test_a_publication_that_was_cut_off_goes_on_and_has_the_same_digest(
    store: Store, pack: Pack, tmp_path: Path
) -> None:
    again = encrypted(store, tmp_path / "again", make_pack(tmp_path / "shards-again"))
    assert again.digest == pack.digest
    assert again.publish(store).sent_objects == 0
    gone = pack.manifest.shards[0].sha256
    store.delete(keys.blob(gone))
    assert again.publish(store).sent_objects == 1
    assert load.verify(store, "demo", pack.digest)


def test_versions_share_equal_blobs_and_a_new_secret_shares_none(store: Store, pack: Pack, tmp_path: Path) -> None:
    changed = torch_checkpoint()
    changed.tensors["layer.2.weight"] = changed.tensors["layer.2.weight"] + 1
    second = encrypted(store, tmp_path / "sealed2", make_pack(tmp_path / "shards2", changed))
    shared = set(second.manifest.blobs()) & set(pack.manifest.blobs())
    assert len(shared) >= 3
    assert second.publish(store).sent_objects == len(second.manifest.blobs()) - len(shared)
    secrets.renew(store, "demo", [KEY])
    third = encrypted(store, tmp_path / "sealed3", make_pack(tmp_path / "shards3"))
    assert not set(third.manifest.blobs()) & set(pack.manifest.blobs())
    third.publish(store)
    for found in (pack, second, third):
        assert_same(load.load_checkpoint(store, "demo", found.digest)[1], found.checkpoint)


def test_rotation_sends_no_blob_and_changes_no_pack(
    store: Store, pack: Pack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {info.key: store.get(info.key) for info in store.list("blobs/")}
    fresh = base64.b64encode(b"N" * 32).decode()
    monkeypatch.setenv("MODELPRESS_KEY", f"{fresh},{TEXT}")
    with pytest.raises(SystemExit):
        cli.main(["keys", "rotate", "demo", "--forget"])
    assert {info.key: store.get(info.key) for info in store.list("blobs/")} == before
    monkeypatch.setenv("MODELPRESS_KEY", fresh)
    assert_same(load.load_checkpoint(store, "demo", pack.digest)[1], pack.checkpoint)
    monkeypatch.setenv("MODELPRESS_KEY", TEXT)
    with pytest.raises(EncryptionKeyError):
        load.verify(store, "demo", pack.digest)
    assert TEXT not in (shown := "".join(capsys.readouterr()))
    assert fresh not in shown


def tampered(store: Store, manifest: Manifest, edit: Callable[[dict[str, Any]], None]) -> str:
    """Publish a changed manifest, as who can write to the store could; its digest."""
    document = json.loads(manifest.to_bytes())
    edit(document)
    data = canonical_json(document)
    digest = hashlib.sha256(data).hexdigest()
    store.put(keys.manifest("demo", digest), data)
    return digest


def put_blob(store: Store, data: bytes) -> str:
    digest = hashlib.sha256(data).hexdigest()
    store.put(keys.blob(digest), data)
    return digest


def test_a_damaged_blob_is_refused_by_its_digest(store: Store, pack: Pack) -> None:
    shard = pack.manifest.shards[0]
    data = bytearray(store.get(keys.blob(shard.sha256)))
    data[100] ^= 1
    store.put(keys.blob(shard.sha256), bytes(data))
    with pytest.raises(CorruptionError, match=f"shard 0 .*{shard.sha256}"):
        load.verify(store, "demo", pack.digest)


def test_segments_that_were_swapped_under_a_changed_manifest_are_refused(store: Store, pack: Pack) -> None:
    """The manifest is rewritten to name the swapped blob: the digests agree, and the segments still do not open."""
    shard = pack.manifest.shards[0]
    data, step = store.get(keys.blob(shard.sha256)), SEGMENT + 16
    assert len(data) > 2 * step
    digest = put_blob(store, data[step : 2 * step] + data[:step] + data[2 * step :])
    changed = tampered(store, pack.manifest, lambda found: found["shards"][0].update(sha256=digest))
    with pytest.raises(CorruptionError, match="segment 0 of"):
        load.verify(store, "demo", changed)


def test_a_blob_of_another_pack_of_the_model_in_its_place_is_refused(store: Store, pack: Pack, tmp_path: Path) -> None:
    other = encrypted(store, tmp_path / "sealed2", make_pack(tmp_path / "shards2", torch_checkpoint(seed=1)))
    other.publish(store)
    theirs = other.manifest.shards[0]

    def in_place(found: dict[str, Any]) -> None:
        size = found["shards"][0]["plain"]["size_bytes"] + theirs.size_bytes - found["shards"][0]["size_bytes"]
        found["shards"][0].update(sha256=theirs.sha256, size_bytes=theirs.size_bytes)
        found["shards"][0]["plain"]["size_bytes"] = size

    with pytest.raises(CorruptionError, match="which this key did not seal"):
        load.verify(store, "demo", tampered(store, pack.manifest, in_place))


def test_a_secret_of_another_model_opens_nothing(store: Store, pack: Pack) -> None:
    theirs, _ = secrets.current(store, "other", [KEY])
    changed = tampered(store, pack.manifest, lambda found: found["encryption"].update(secret=theirs))
    with pytest.raises(EncryptionKeyError, match="no entry"):
        load.verify(store, "demo", changed)
    secrets.renew(store, "demo", [KEY])
    newer, _ = secrets.current(store, "demo", [KEY])
    changed = tampered(store, pack.manifest, lambda found: found["encryption"].update(secret=newer))
    with pytest.raises(CorruptionError, match="which this key did not seal"):
        load.verify(store, "demo", changed)


@pytest.mark.parametrize(
    "edit",
    [
        lambda found: found.pop("encryption"),
        lambda found: found["shards"][0].pop("plain"),
        lambda found: found["files"][0].pop("plain"),
        lambda found: found["reports"].pop("plain"),
        lambda found: found.update(format_version=2),
        lambda found: found["encryption"].update(algorithm="rot13"),
        lambda found: found["encryption"].update(segment_bytes=0),
        lambda found: found["encryption"].update(segment_bytes=2**25),
        lambda found: found["encryption"].update(segment_bytes=100),
        lambda found: found["encryption"].update(secret="AB"),
        lambda found: found["shards"][0]["plain"].update(size_bytes=1),
        lambda found: found["shards"][0]["plain"].update(more=1),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    store: Store, pack: Pack, edit: Callable[[dict[str, Any]], None]
) -> None:
    with pytest.raises(CorruptionError):
        load.verify(store, "demo", tampered(store, pack.manifest, edit))


def test_a_shard_that_changed_on_the_disk_is_not_sealed(store: Store, tmp_path: Path) -> None:
    made = make_pack(tmp_path / "shards")
    data = bytearray(made.shards[0].path.read_bytes())
    data[-1] ^= 1
    made.shards[0].path.write_bytes(data)
    with pytest.raises(CorruptionError, match="run the stage again"):
        encrypted(store, tmp_path / "sealed", made)
    assert not any((tmp_path / "sealed").iterdir()), "its key sealed other bytes: nothing of it may stay"


def test_an_encrypted_pack_is_not_encrypted_again(store: Store, pack: Pack, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="an encrypted pack"):
        encrypted(store, tmp_path / "twice", pack)


def test_a_pack_without_encryption_is_written_as_before(store: Store, tmp_path: Path) -> None:
    made = make_pack(tmp_path / "shards")
    assert made.manifest.format_version == 2
    assert b"plain" not in made.manifest.to_bytes()
    assert b"encryption" not in made.manifest.to_bytes()
    publish(store, made.manifest, made.shards, made.blobs, source_bytes=1)
    assert_same(load.load_checkpoint(store, "demo", made.digest)[1], made.checkpoint)


def test_commands_show_ids_and_no_key(
    store: Store, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        return int(ended.value.code or 0), "".join(capsys.readouterr())

    (entry,) = secrets.history(store, "demo")
    code, shown = run("keys", "show", "demo")
    assert (code, KEY.id in shown, entry.secrets[0] in shown) == (0, True, True)
    assert json.loads(run("keys", "show", "demo", "--json")[1])[0]["secrets"] == list(entry.secrets)
    assert run("keys", "new", "demo")[0] == 0
    assert len(secrets.history(store, "demo")[-1].secrets) == 2
    assert run("verify", f"demo@{pack.digest}")[0] == 0
    code, shown = run("inspect", f"demo@{pack.digest}")
    assert (code, f"secret {entry.secrets[0]}" in shown) == (0, True)
    monkeypatch.delenv("MODELPRESS_KEY")
    code, shown = run("inspect", f"demo@{pack.digest}")
    assert (code, "no key in the settings opens it" in shown, "layer.0.weight" in shown) == (0, True, True)
    assert run("inspect", f"demo@{pack.digest}", "--tensor", "scale")[0] == EncryptionKeyError.exit_code
    assert run("verify", f"demo@{pack.digest}")[0] == EncryptionKeyError.exit_code
    assert run("keys", "rotate", "demo")[0] == EncryptionKeyError.exit_code
    code, shown = run("keys", "make", str(tmp_path / "key"))
    assert (code, (tmp_path / "key").read_text().strip() in shown) == (0, False)
    assert run("share", f"demo@{pack.digest}", "--to", str(tmp_path / "links"))[0] == 8


@pytest.mark.faults
def test_no_memory_for_what_is_opened_is_a_named_error_and_leaves_no_thread(
    store: Store, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two buffers for what comes and one for what is opened were to be had; the first shard is on its way."""
    given: list[int] = []

    def scarce(size: int) -> memoryview:
        given.append(size)
        if len(given) == 4:
            raise OSError(errno.ENOMEM, "no memory")
        return memory(size)

    class Endless(LocalStore):
        def read_into(
            self, key: str, buffer: Buffer, start: int = 0, arrived: Callable[[memoryview], None] = lambda _: None
        ) -> None:
            while True:
                arrived(memoryview(b""))

    monkeypatch.setattr("modelpress.load.stream.memory", scarce)
    parts = load.open_parts(Endless(tmp_path / "store"), pack.manifest)
    with pytest.raises(SetupError, match="max_shard_size"):
        next(parts.stream())
    assert len(given) == 4
    assert [one.name for one in threading.enumerate() if one.name.startswith("shard")] == []
