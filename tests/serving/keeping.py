"""A server that keeps what it serves, and stores that are down, for the tests of it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelpress.errors import StoreUnavailableError
from modelpress.settings import read_settings
from modelpress.store import Store
from modelpress.store.local import LocalStore
from modelpress.store.s3 import S3Store
from serving.kept import Kept
from serving.repository import Repository


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Store]:
    """A store on S3 whose server is down: its port refuses connections."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("MODELPRESS_S3_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("MODELPRESS_S3_ATTEMPTS", "1")
        store = S3Store("s3://models/prod", read_settings())
        yield store
        store.close()


class Shaky(LocalStore):
    """A store that does not answer while it is `down`."""

    down = False

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        self._answer()
        return super().get(key, start, length)

    def list(self, prefix: str = "") -> Iterator[Any]:
        self._answer()
        return super().list(prefix)

    def _answer(self) -> None:
        if self.down:
            raise StoreUnavailableError("asking the store", found="no answer")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kept"


def started(store: Store, folder: Path, *models: str, **options: Any) -> tuple[Repository, Kept]:
    kept = Kept(folder, store)
    repository = Repository(store, models, threads=1, retry_seconds=0.0, kept=kept, **options)
    try:
        repository.start()
    except BaseException:
        kept.close()
        raise
    return repository, kept


def once(store: Store, folder: Path, *models: str) -> None:
    """A server that started, kept what it serves, and ended."""
    _, kept = started(store, folder, *models)
    kept.close()


def files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "blobs" / "sha256").iterdir()}
