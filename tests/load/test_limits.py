"""Lengths that are refused before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelpress import keys, load
from modelpress.errors import CorruptionError
from modelpress.store.local import LocalStore


def test_a_giant_manifest_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    path = tmp_path / keys.manifest("demo", "0" * 64)
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(load.MAX_MANIFEST_BYTES + 1)  # a hole: it takes no disk
    read: list[str] = []
    monkeypatch.setattr(store, "get", lambda key, *_: read.append(key))
    with pytest.raises(CorruptionError, match=f"at most {load.MAX_MANIFEST_BYTES} bytes"):
        load.load_manifest(store, "demo", "0" * 64)
    assert read == []
