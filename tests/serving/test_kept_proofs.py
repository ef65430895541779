"""What a server kept is held to the same proofs as what is in the store: digests, signatures, keys."""

from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from modelpress import keys, pointer
from modelpress.cipher import LocalKey, seal_pack, secrets
from modelpress.compress import compress
from modelpress.config import CompressConfig, ShardConfig
from modelpress.errors import StoreUnavailableError
from modelpress.publish import publish
from modelpress.shard import draft_manifest, write_shards
from modelpress.store import Store
from modelpress.store.local import LocalStore
from modelpress.store.s3 import S3Store
from tests.serving.conftest import publish_pack, scale_model
from tests.serving.keeping import folder, gone, once, started
from tests.serving.test_repository import answer, flip_bit
from tests.trust.teams import Team

Call = Callable[..., Any]
__all__ = ["folder", "gone"]


def flip_blob(kept: LocalStore) -> None:
    flip_bit(kept, max((info for info in kept.list("blobs/sha256/")), key=lambda info: info.size_bytes).key)


def flip_manifest(kept: LocalStore) -> None:
    flip_bit(kept, next(info.key for info in kept.list("packs/") if keys.manifest_owner(info.key)))


def flip_pointer(kept: LocalStore) -> None:
    flip_bit(kept, keys.pointer("scale", "champion", 1))


def drop_blob(kept: LocalStore) -> None:
    kept.delete(next(info.key for info in kept.list("blobs/sha256/")))


@pytest.mark.parametrize("damage", [flip_blob, flip_manifest, flip_pointer, drop_blob])
def test_a_copy_that_was_changed_is_refused(
    store: Store, press: Call, gone: S3Store, folder: Path, caplog: pytest.LogCaptureFixture, damage: Call
) -> None:
    press(scale_model(2.0))
    once(store, folder, "scale")
    damage(LocalStore(folder))
    with pytest.raises(StoreUnavailableError):
        started(gone, folder, "scale")
    assert "what is kept on this machine is not served" in caplog.text


def test_a_copy_counts_as_long_as_its_signatures_do(
    tmp_path: Path, press_signed: Call, gone: S3Store, folder: Path, team: Team, caplog: pytest.LogCaptureFixture
) -> None:
    press_signed(scale_model(2.0))
    once(team.store(), folder, "scale")
    gone.trust = team.trust()
    models, kept = started(gone, folder, "scale")
    with kept:
        assert answer(models) == 2.0
        assert models.model("scale").answering().trust == gone.trust.fingerprint
    team.change("farm", revoked=(datetime.now(UTC) - timedelta(seconds=1)).isoformat())
    with pytest.raises(StoreUnavailableError):
        started(gone, folder, "scale")
    assert "is not served" in caplog.text


def test_an_entry_that_nobody_signed_is_refused(
    press_signed: Call, gone: S3Store, folder: Path, team: Team, caplog: pytest.LogCaptureFixture
) -> None:
    """Who can write to the folder can not choose what is served."""
    press_signed(scale_model(2.0))
    once(team.store(), folder, "scale")
    copies = LocalStore(folder)
    entry = pointer.entry(copies, "scale", "champion", 1)
    forged = entry.model_copy(update={"format_version": 1, "signature": None})
    copies.put(keys.pointer("scale", "champion", 1), forged.to_bytes())
    gone.trust = team.trust()
    with pytest.raises(StoreUnavailableError):
        started(gone, folder, "scale")
    assert "is not served" in caplog.text


@pytest.fixture
def team(tmp_path: Path) -> Team:
    (tmp_path / "team").mkdir()
    return Team(tmp_path / "team", farm="publisher")


@pytest.fixture
def press_signed(team: Team, tmp_path_factory: pytest.TempPathFactory) -> Call:
    def press(checkpoint: Any, name: str = "scale") -> str:
        return publish_pack(team.store("farm"), tmp_path_factory.mktemp("shards"), checkpoint, name)

    return press


def test_an_encrypted_copy_opens_with_its_key_alone(
    store: Store, gone: S3Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELPRESS_KEY", base64.b64encode(b"K" * 32).decode())
    coded, report = compress(scale_model(2.0), CompressConfig())
    shards, _ = write_shards(coded, ShardConfig(), tmp_path)
    manifest, blobs = draft_manifest("scale", coded, shards)
    secret = secrets.current(store, "scale", [LocalKey(b"K" * 32)])
    manifest, shards, blobs = seal_pack(manifest, shards, blobs, secret, tmp_path / "sealed")
    pack = publish(store, manifest, shards, blobs, source_bytes=report.raw_bytes).pack
    pointer.append(store, "scale", "champion", pack, "promote")
    once(store, folder, "scale")
    models, kept = started(gone, folder, "scale")
    with kept:
        assert answer(models) == 2.0
    monkeypatch.setenv("MODELPRESS_KEY", base64.b64encode(b"L" * 32).decode())
    with pytest.raises(StoreUnavailableError):
        started(gone, folder, "scale")
