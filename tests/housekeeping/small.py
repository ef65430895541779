"""Packs of a few bytes, and stores for tests of what happens in which order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from modelpress import keys
from modelpress.config import UploadConfig
from modelpress.manifest import Manifest
from modelpress.publish import publish
from modelpress.reports import UploadReport
from modelpress.store import ObjectInfo, Store, Unfinished
from modelpress.store.base import check_digest, check_key

START = datetime(2026, 1, 1, tzinfo=UTC)


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class SmallPack:
    """A pack whose blobs are files of a few bytes."""

    def __init__(self, contents: Sequence[bytes], *, name: str = "demo", note: str = "", base: str | None = None):
        self.blobs = {digest_of(data): data for data in contents}
        files = [
            {
                "name": f"f{i}",
                "sha256": d,
                "size_bytes": len(b),
                "codec": "raw",
                "stored_sha256": d,
                "stored_bytes": len(b),
            }
            for i, (d, b) in enumerate(self.blobs.items())
        ]
        document = {"name": name, "kind": "torch", "shards": [], "tensors": [], "files": files, "licence": note}
        nothing = digest_of(b"")
        taken = {
            "name": "t",
            "dtype": "U8",
            "shape": [0],
            "codec": "raw",
            "raw_sha256": nothing,
            "shards": [],
            "base": "t",
        }
        taken |= {"stored_sha256": nothing, "stored_bytes": 0, "entropy_bound_bytes": 0}
        later = {"base": base, "tensors": [taken], "format_version": 3} if base else {}
        self.manifest = Manifest.model_validate(document | later)

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def digest(self) -> str:
        return self.manifest.digest

    def publish(self, store: Store) -> UploadReport:
        # One object at a time: the order of the steps is what these tests choose.
        config = UploadConfig(concurrency=1)
        return publish(store, self.manifest, [], self.blobs, config=config, source_bytes=1)

    def write(self, store: Store) -> None:
        """Put it there without asking whether its base fits."""
        for digest, data in self.blobs.items():
            store.put(keys.blob(digest), data)
        store.put(keys.manifest(self.name, self.digest), self.manifest.to_bytes())


class MemoryStore(Store):
    """Objects in memory, with a clock that tests set. What a store promises, and nothing that makes it slow."""

    def __init__(self) -> None:
        super().__init__("memory://store")
        self.objects: dict[str, tuple[bytes, datetime]] = {}
        self.time = START
        self.parts: list[Unfinished] = []

    def rules(self, monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
        """Make this store's clock what `datetime.now` tells in some modules."""
        store = self

        class Clock(datetime):
            @classmethod
            def now(cls, tz: object = None) -> datetime:  # type: ignore[override]  # noqa: ARG003
                return store.time

        for module in modules:
            monkeypatch.setattr(f"{module}.datetime", Clock)

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        from modelpress.errors import NotFoundError

        if key not in self.objects:
            raise NotFoundError(f"reading {key}", found="no object")
        data = self.objects[key][0]
        return data[start : None if length is None else start + length]

    def read_into(
        self, key: str, buffer: Any, start: int = 0, arrived: Callable[[memoryview], None] = lambda _: None
    ) -> None:
        view = memoryview(buffer).cast("B")
        view[:] = self.get(key, start, len(view))
        arrived(view)

    def download(self, key: str, path: Path) -> str:
        path.write_bytes(self.get(key))
        return digest_of(self.get(key))

    def put(self, key: str, data: bytes | Path, *, if_absent: bool = False, sha256: str | None = None) -> bool:
        assert isinstance(data, bytes)
        check_digest("storing", digest_of(data), sha256)
        if if_absent and key in self.objects:
            return False
        self.objects[check_key(key)] = (data, self.time)
        return True

    def info(self, key: str) -> ObjectInfo | None:
        found = self.objects.get(key)
        return None if found is None else ObjectInfo(key, len(found[0]), found[1])

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        found = sorted(key for key in self.objects if key.startswith(prefix))
        return iter([ObjectInfo(key, len(self.objects[key][0]), self.objects[key][1]) for key in found])

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    def unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        return iter([one for one in self.parts if one.key.startswith(prefix)])

    def abort(self, upload: Unfinished) -> None:
        self.parts.remove(upload)

    def check_fit(self) -> None:
        """It is."""

    def later(self, **time: float) -> None:
        self.time += timedelta(**time)


def broken(store: MemoryStore) -> list[str]:
    """Blobs that a manifest names and the store lacks, or holds otherwise: there must never be one."""
    found = []
    for key in list(store.objects):
        if (owner := keys.manifest_owner(key)) is not None:
            manifest = Manifest.parse(store.objects[key][0], owner[1])
            found += [
                f"{owner}: {d}"
                for d, n in manifest.blobs().items()
                if len(store.objects.get(keys.blob(d), (b"",))[0]) != n
            ]
    return found
