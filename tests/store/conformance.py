"""What every store must do. A test class inherits `StoreConformance` and has a fixture `store`."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from modelpress.errors import ConfigError, CorruptionError, NotFoundError
from modelpress.store import Store, open_store
from modelpress.store.artifacts import load_artifact, save_artifact

WEIRD_KEYS = [
    "a",
    "spaces in  names/ and edges ",
    "ünïcödé/日本語/🦉",
    "per%cent/%2F/100%25",
    "plus+and=equals/&amp;?query#fragment",
    "quotes'\"<>|*:;,@!$()[]{}~`^",
    "dots/.hidden/..double/trailing./...",
    "-dash/_underscore",
    "deep/" + "/".join("abcdefghij"),
    "x" * 255,
]
ILLEGAL_KEYS = ["", "/a", "a/", "a//b", "..", "a/../b", "./a", "a\\b", "a\0b", "x" * 256, ".incoming/x"]
RACERS = 16


class StoreConformance:
    def test_put_then_get(self, store: Store) -> None:
        assert store.put("a/b", b"hello")
        assert store.get("a/b") == b"hello"
        info = store.info("a/b")
        assert info is not None
        assert (info.key, info.size_bytes) == ("a/b", 5)

    def test_put_replaces(self, store: Store) -> None:
        store.put("k", b"first")
        store.put("k", b"second, longer")
        assert store.get("k") == b"second, longer"

    def test_empty_object(self, store: Store) -> None:
        store.put("empty", b"")
        assert store.get("empty") == b""
        info = store.info("empty")
        assert info is not None
        assert info.size_bytes == 0

    def test_put_and_download_a_file(self, store: Store, tmp_path: Path) -> None:
        source, target = tmp_path / "source", tmp_path / "target"
        source.write_bytes(bytes(range(256)) * 5000)
        store.put("file", source)
        assert store.download("file", target) == hashlib.sha256(source.read_bytes()).hexdigest()
        assert target.read_bytes() == source.read_bytes()
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["source", "target"]

    @pytest.mark.parametrize(
        ("start", "length"), [(0, None), (0, 10), (3, 4), (9, 1), (10, None), (0, 0), (10, 0), (4, None)]
    )
    def test_ranges(self, store: Store, start: int, length: int | None) -> None:
        data = b"0123456789"
        store.put("digits", data)
        assert store.get("digits", start, length) == (data[start:] if length is None else data[start : start + length])

    @pytest.mark.parametrize(("start", "length"), [(0, 11), (9, 2), (10, 1), (11, None), (11, 0), (99, 1)])
    def test_a_range_that_ends_behind_the_object_is_refused(self, store: Store, start: int, length: int | None) -> None:
        store.put("digits", b"0123456789")
        with pytest.raises(CorruptionError, match="10 bytes"):
            store.get("digits", start, length)

    @pytest.mark.parametrize(("start", "length"), [(-1, None), (0, -1)])
    def test_a_negative_range_is_refused(self, store: Store, start: int, length: int | None) -> None:
        store.put("digits", b"0123456789")
        with pytest.raises(ConfigError):
            store.get("digits", start, length)

    def test_missing_object(self, store: Store, tmp_path: Path) -> None:
        store.put("there/it/is", b"x")
        for key in ("nothing", "there", "there/it", "there/it/is/not"):
            assert store.info(key) is None
            with pytest.raises(NotFoundError, match=key):
                store.get(key)
            with pytest.raises(NotFoundError, match=key):
                store.get(key, 0, 0)
            with pytest.raises(NotFoundError, match=key):
                store.download(key, tmp_path / "target")
            store.delete(key)
        assert list(tmp_path.glob("*target*")) == []
        assert store.get("there/it/is") == b"x"

    def test_put_a_missing_file(self, store: Store, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError, match="absent"):
            store.put("k", tmp_path / "absent")
        assert store.info("k") is None

    def test_if_absent_leaves_what_is_there(self, store: Store) -> None:
        assert store.put("once", b"first", if_absent=True)
        assert not store.put("once", b"second", if_absent=True)
        assert not store.put("once", b"first", if_absent=True)
        assert store.get("once") == b"first"

    def test_if_absent_after_delete(self, store: Store) -> None:
        store.put("once", b"first", if_absent=True)
        store.delete("once")
        assert store.put("once", b"second", if_absent=True)
        assert store.get("once") == b"second"

    def test_a_race_has_one_winner(self, store: Store) -> None:
        barrier = threading.Barrier(RACERS)

        def race(number: int) -> bool:
            barrier.wait()
            return store.put("race", b"racer %d" % number, if_absent=True)

        with ThreadPoolExecutor(RACERS) as pool:
            won = list(pool.map(race, range(RACERS)))
        assert sum(won) == 1
        assert store.get("race") == b"racer %d" % won.index(True)

    @pytest.mark.parametrize("if_absent", [False, True])
    @pytest.mark.parametrize("as_file", [False, True])
    def test_bytes_of_another_digest_never_become_visible(
        self, store: Store, tmp_path: Path, if_absent: bool, as_file: bool
    ) -> None:
        path = tmp_path / "data"
        path.write_bytes(b"data")
        data = path if as_file else b"data"
        with pytest.raises(CorruptionError, match=hashlib.sha256(b"data").hexdigest()):
            store.put("k", data, if_absent=if_absent, sha256="0" * 64)
        assert store.info("k") is None
        assert store.put("k", data, if_absent=if_absent, sha256=hashlib.sha256(b"data").hexdigest())

    def test_list_is_sorted_and_takes_any_prefix(self, store: Store) -> None:
        keys = ["b/2", "b/10", "b/1", "a", "b.c", "b-c", "bb/x/y", "é", "z"]
        for key in keys:
            store.put(key, key.encode())
        found = list(store.list())
        assert [info.key for info in found] == sorted(keys, key=str.encode)
        assert all(info.size_bytes == len(info.key.encode()) for info in found)
        for prefix in ("b", "b/", "b/1", "bb/x/", "a", "none", "none/at/all", "é", "a/"):
            expected = sorted((key for key in keys if key.startswith(prefix)), key=str.encode)
            assert [info.key for info in store.list(prefix)] == expected

    def test_folders(self, store: Store) -> None:
        for key in ("p/b/1", "p/b/2/3", "p/a.json", "p/é/x", "p/c", "q/d/e", ".e/f"):
            store.put(key, b"x")
        assert list(store.folders("p/")) == ["b", "é"]
        assert list(store.folders("p/b/")) == ["2"]
        assert list(store.folders("none/")) == []
        assert sorted(store.folders("")) == [".e", "p", "q"]

    def test_delete(self, store: Store) -> None:
        store.put("k", b"x")
        store.delete("k")
        assert store.info("k") is None
        assert list(store.list()) == []
        store.delete("k")

    @pytest.mark.parametrize("key", WEIRD_KEYS)
    def test_weird_but_legal_keys(self, store: Store, key: str) -> None:
        assert store.put(key, key.encode(), if_absent=True)
        assert not store.put(key, b"other", if_absent=True)
        assert store.get(key) == key.encode()
        assert [info.key for info in store.list()] == [key]
        store.delete(key)
        assert store.info(key) is None

    @pytest.mark.parametrize(
        "key", ["", "/a", "a/", "a//b", "..", "a/../b", "./a", "a\\b", "a\0b", "x" * 256, ".incoming/x"]
    )
    def test_illegal_keys_are_refused_everywhere(self, store: Store, tmp_path: Path, key: str) -> None:
        for call in (
            lambda: store.get(key),
            lambda: store.put(key, b""),
            lambda: store.info(key),
            lambda: store.delete(key),
            lambda: store.download(key, tmp_path / "target"),
        ):
            with pytest.raises(ConfigError, match="object key"):
                call()
        assert list(store.list()) == []

    def test_check_fit_leaves_nothing(self, store: Store) -> None:
        store.check_fit()
        store.ensure_fit()
        assert list(store.list()) == []

    def test_artifacts_by_content(self, store: Store) -> None:
        ref = save_artifact(store, b"content")
        assert save_artifact(store, b"content") == ref
        assert load_artifact(ref) == b"content"
        assert len(list(store.list())) == 1

    def test_a_damaged_artifact_is_refused_and_mended(self, store: Store) -> None:
        ref = save_artifact(store, b"content")
        (info,) = store.list()
        store.put(info.key, b"cOntent")
        with pytest.raises(CorruptionError, match=ref.sha256):
            load_artifact(ref)
        store.put(info.key, b"short")
        save_artifact(store, b"content")
        assert load_artifact(ref) == b"content"

    def test_a_missing_artifact(self, store: Store) -> None:
        ref = save_artifact(store, b"content")
        for info in store.list():
            store.delete(info.key)
        with pytest.raises(NotFoundError):
            load_artifact(ref)
        with pytest.raises(ConfigError):
            load_artifact(ref.model_copy(update={"uri": f"{store.uri}/elsewhere"}))

    def test_the_uri_opens_the_same_store(self, store: Store) -> None:
        store.put("k", b"x")
        again = open_store(store.uri)
        assert again.uri == store.uri
        assert again.get("k") == b"x"

    @pytest.mark.parametrize(("start", "length"), [(0, 10), (3, 4), (9, 1), (10, 0), (0, 0)])
    def test_bytes_come_into_given_memory(self, store: Store, start: int, length: int) -> None:
        store.put("digits", b"0123456789")
        buffer, came = bytearray(b"x" * length), bytearray()
        store.read_into("digits", buffer, start, came.extend)
        assert bytes(buffer) == bytes(came) == b"0123456789"[start : start + length]

    def test_a_large_object_comes_in_order(self, store: Store) -> None:
        data = bytes(range(251)) * (18 * 2**20 // 251)
        store.put("large", data)
        buffer, digest = bytearray(len(data) - 5), hashlib.sha256()
        store.read_into("large", memoryview(buffer), 5, digest.update)
        assert buffer == data[5:]
        assert digest.digest() == hashlib.sha256(data[5:]).digest()

    @pytest.mark.parametrize(("start", "length"), [(0, 11), (9, 2), (10, 1), (11, 0), (99, 1)])
    def test_memory_that_the_object_does_not_fill_is_refused(self, store: Store, start: int, length: int) -> None:
        store.put("digits", b"0123456789")
        with pytest.raises(CorruptionError, match="10 bytes"):
            store.read_into("digits", bytearray(length), start)
        with pytest.raises(NotFoundError):
            store.read_into("none", bytearray(length))

    def test_whoever_takes_the_bytes_can_end_it(self, store: Store) -> None:
        store.put("large", bytes(2**25))

        def refuse(data: memoryview) -> None:
            raise RuntimeError("enough")

        with pytest.raises(RuntimeError, match="enough"):
            store.read_into("large", bytearray(2**25), 0, refuse)
