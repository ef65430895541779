from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from modelpress.cipher.wrapping import make_key_file
from modelpress.errors import ConfigError, ConflictError, StoreFullError
from modelpress.store import Store, open_store
from modelpress.store.base import RESERVED, check_key, put_once
from modelpress.store.links import Link, Links
from modelpress.store.local import STALE_SECONDS, LocalStore
from modelpress.trust import Signer
from tests.store.conformance import StoreConformance

NOBODY = 65534
NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)
LINK = Link(url=SecretStr("http://host/x"), size_bytes=0, modified=NOON)
LINKS = Links(name="demo", pack="0" * 64, expires=NOON, objects={"packs/x": LINK})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return LocalStore(tmp_path / "a store, with ünicode & %20")


class TestLocalStore(StoreConformance):
    pass


@pytest.mark.parametrize(
    "write",
    [make_key_file, lambda path: Signer.generate().save(path), lambda path: LINKS.write(path)],
    ids=["wrapping key", "signing key", "links"],
)
def test_of_a_file_of_secrets_that_cannot_be_written_nothing_stays(
    tmp_path: Path, write: Callable[[Path], object]
) -> None:
    """A part of it would be taken for a key, or keep the next attempt from writing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(StoreFullError, match="secret"):
            write(tmp_path / "secret")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
    write(tmp_path / "secret")
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="file"):
        write(tmp_path / "secret")


@pytest.mark.parametrize("scheme", ["gs://bucket", "http://host/x", ""])
def test_an_unknown_scheme_is_refused(scheme: str) -> None:
    with pytest.raises(ConfigError, match="s3://"):
        open_store(scheme)


def test_an_object_and_a_folder_cannot_share_a_name(store: Store) -> None:
    store.put("a", b"x")
    with pytest.raises(ConflictError):
        store.put("a/b", b"y")
    store.put("c/d", b"y")
    for if_absent in (False, True):
        with pytest.raises(ConflictError):
            store.put("c", b"y", if_absent=if_absent)
    assert [info.key for info in store.list()] == ["a", "c/d"]


def test_files_have_the_rights_of_the_umask(store: Store, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        store.put("k", b"x")
    finally:
        os.umask(before)
    (path,) = tmp_path.rglob("k")
    assert path.stat().st_mode & 0o777 == 0o644


def test_only_what_killed_writers_left_long_ago_is_swept(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.check_fit()
    old, young = tmp_path / RESERVED / "old", tmp_path / RESERVED / "young"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, times=(time.time() - 2 * STALE_SECONDS,) * 2)
    store.check_fit()
    assert not old.exists()
    assert young.exists()
    assert list(store.list()) == []


DENIED = """
import os, sys
from pathlib import Path
from modelpress.errors import AccessDeniedError
from modelpress.store.local import LocalStore
if os.geteuid() == 0:  # root may do everything
    os.setgid({nobody})
    os.setuid({nobody})
store = LocalStore(Path(sys.argv[1]))
assert store.get("readable") == b"x"
for call in (
    lambda: store.put("new", b"y"),
    lambda: store.put("new", b"y", if_absent=True),
    lambda: store.delete("readable"),
    lambda: store.get("secret"),
):
    try:
        call()
    except AccessDeniedError as error:
        assert str(store.folder) in str(error) and str(os.geteuid()) in str(error)
    else:
        raise SystemExit("a forbidden call went through")
"""


def test_a_folder_without_the_right(tmp_path: Path) -> None:
    # Below the system's temporary folder: pytest's own is closed to other users.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        LocalStore(folder).put("readable", b"x")
        LocalStore(folder).put("secret", b"x")
        (folder / "secret").chmod(0)
        (folder / RESERVED).chmod(0o555)
        folder.chmod(0o555)
        try:
            command = [sys.executable, "-c", DENIED.format(nobody=NOBODY), name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        finally:
            folder.chmod(0o755)
    assert done.returncode == 0, done.stderr + done.stdout


@given(st.text())
def test_a_key_that_passes_stays_inside_the_folder(key: str) -> None:
    root = Path("/store/root")
    try:
        check_key(key)
    except ConfigError:
        return
    path = Path(os.path.normpath(root / key))
    assert path.is_relative_to(root)
    assert path.relative_to(root).as_posix() == key
    assert len(key.encode()) <= 1024


@given(st.lists(st.sampled_from(["a", "b.c", "..", ".", "", "\\", "\0", ".incoming", "ü", "x" * 256]), max_size=5))
def test_only_plain_segments_pass(segments: list[str]) -> None:
    plain = bool(segments) and all(segment in ("a", "b.c", "ü", ".incoming") for segment in segments)
    if plain and segments[0] != ".incoming":
        assert check_key("/".join(segments)) == "/".join(segments)
    else:
        with pytest.raises(ConfigError):
            check_key("/".join(segments))


def test_what_is_named_by_its_content_is_written_once_and_stays(store: Store) -> None:
    def put(data: bytes) -> bool:
        return put_once(store, "k", data, "keeping it", expected="nothing", again="keep")

    assert [put(b"same"), put(b"same")] == [True, False]
    for other in (b"diff", b"longer than that", b""):
        with pytest.raises(ConflictError, match=r"(?s)keeping it.*other bytes under .*/k.*keep again"):
            put(other)
    assert store.get("k") == b"same"
