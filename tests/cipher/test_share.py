"""Links: a process without credentials loads one pack for a while, verified; everything else is refused and hidden."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from modelpress import keys, load, pointer
from modelpress.cipher import LocalKey, seal_pack, secrets
from modelpress.errors import (
    AccessDeniedError,
    ConfigError,
    CorruptionError,
    EncryptionKeyError,
    ModelpressError,
    NotFoundError,
    StoreUnavailableError,
    StoreUnfitError,
)
from modelpress.settings import Settings
from modelpress.share import parse_duration, share
from modelpress.store import Store, open_store
from modelpress.store.links import Links
from tests.conftest import OpenS3
from tests.packs import Pack, assert_same, make_pack


def published(store: Store, folder: Path) -> Pack:
    pack = make_pack(folder)
    pack.publish(store)
    pointer.append(store, "demo", "champion", pack.digest, "promote")
    return pack


def without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)


@pytest.mark.s3
def test_links_load_a_pack_without_credentials_until_they_end(
    open_s3: OpenS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = open_s3("writer")
    pack, path = published(writer, tmp_path / "shards"), tmp_path / "a folder" / "links.json"
    path.parent.mkdir()
    share(writer, "demo", "champion", 3600).write(path)
    short = share(writer, "demo", pack.digest, 1)
    short.write(tmp_path / "short.json")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    signatures = [one.url.get_secret_value() for one in short.objects.values()]
    assert all("X-Amz-Signature=" in url for url in signatures), "of SigV4"

    without_credentials(monkeypatch)
    caplog.set_level(logging.DEBUG)
    store = open_store(f"links+{path.as_uri()}")
    assert load.resolve(store, "demo", "champion") == load.resolve(store, "demo", pack.digest[:12]) == pack.digest
    assert_same(load.load_checkpoint(store, "demo", pack.digest)[1], pack.checkpoint)
    assert load.verify(store, "demo", "champion").pack == pack.digest
    load.pull(store, "demo", "champion", tmp_path / "pulled")
    blob = keys.blob(pack.manifest.shards[0].sha256)
    assert store.download(blob, tmp_path / "blob") == pack.manifest.shards[0].sha256
    assert store.get(blob, 3, 10) == (tmp_path / "blob").read_bytes()[3:13]
    with pytest.raises(CorruptionError, match="at least"):
        store.get(blob, 0, 10**9)
    with pytest.raises(NotFoundError, match="ask for links"):
        store.get(keys.blob("0" * 64))
    for refused in (lambda: store.put(blob, b"x"), lambda: store.delete(blob)):
        with pytest.raises(AccessDeniedError, match="a store that can be written"):
            refused()

    time.sleep(2.1)
    with pytest.raises(AccessDeniedError, match="the links ended at") as ended:
        load.verify(open_store(f"links+file://{tmp_path}/short.json"), "demo", pack.digest)
    assert "modelpress share" in str(ended.value)
    for shown in (caplog.text, str(ended.value), repr(short), repr(store.__dict__)):
        assert not any(urlsplit(url).query in shown for url in signatures)
        assert "X-Amz-Signature" not in shown
    store.close()


@pytest.mark.s3
def test_links_to_an_encrypted_pack_open_it_with_its_key_alone(
    open_s3: OpenS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, key = open_s3("writer"), b"K" * 32
    plain = make_pack(tmp_path / "shards")
    secret = secrets.current(writer, "demo", [LocalKey(key)])
    sealed = seal_pack(plain.manifest, plain.shards, plain.blobs, secret, tmp_path / "sealed")
    pack = Pack(*sealed, plain.checkpoint)
    pack.publish(writer)
    share(writer, "demo", pack.digest, 600).write(tmp_path / "links.json")
    without_credentials(monkeypatch)
    store = open_store(f"links+file://{tmp_path}/links.json")
    monkeypatch.delenv("MODELPRESS_KEY", raising=False)
    with pytest.raises(EncryptionKeyError):
        load.load_checkpoint(store, "demo", pack.digest)
    monkeypatch.setenv("MODELPRESS_KEY", base64.b64encode(key).decode())
    assert_same(load.load_checkpoint(store, "demo", pack.digest)[1], pack.checkpoint)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="AWS_CA_BUNDLE"):
        open_store(f"links+file://{tmp_path}/links.json")


@pytest.mark.s3
def test_links_that_were_changed_and_bytes_that_were_changed_are_refused(open_s3: OpenS3, tmp_path: Path) -> None:
    writer = open_s3("writer")
    pack = published(writer, tmp_path / "shards")
    links, path = share(writer, "demo", pack.digest, 3600), tmp_path / "links.json"
    key = keys.blob(pack.manifest.shards[0].sha256)

    def opened(edit: Callable[[dict[str, Any]], None]) -> Store:
        document = json.loads(links.model_dump_json())
        edit(document)
        path.write_text(json.dumps(document))
        return open_store(f"links+file://{path}")

    other = keys.blob(pack.manifest.shards[1].sha256)
    swapped = opened(lambda links: links["objects"][key].update(links["objects"][other]))
    with pytest.raises(CorruptionError):
        load.verify(swapped, "demo", pack.digest)
    longer = opened(lambda links: links["objects"][key].update(size_bytes=10**7))
    with pytest.raises(CorruptionError, match="object of"):
        longer.get(key)
    unsigned = opened(lambda links: links["objects"][key].update(url=links["objects"][key]["url"].partition("?")[0]))
    with pytest.raises(AccessDeniedError, match="were changed"):
        unsigned.get(key)
    nobody = opened(lambda links: links["objects"][key].update(url="http://127.0.0.1:9/x?X-Amz-Signature=abc"))
    nobody._attempts = 1  # type: ignore[attr-defined]
    with pytest.raises(StoreUnavailableError) as unreachable:
        nobody.get(key)
    assert "abc" not in str(unreachable.value)
    writer.put(key, b"z" * pack.manifest.shards[0].size_bytes)
    with pytest.raises(CorruptionError):
        load.verify(opened(dict.copy), "demo", pack.digest)
    writer.delete(key)
    with pytest.raises(NotFoundError, match="deleted"):
        opened(dict.copy).get(key)
    with pytest.raises(NotFoundError, match="no object"):
        share(writer, "demo", pack.digest, 60)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"no json, X-Amz-Signature=abc",
        b'{"format_version": 2}',
        b'{"format_version":1,"name":"demo","pack":"X-Amz-Signature=abc","expires":"2030-01-01T00:00:00Z","objects":{}}',
    ],
)
def test_a_file_that_is_none_of_links_is_refused_and_not_shown(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "links.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        open_store(f"links+file://{path}")
    assert "modelpress share" in str(raised.value)
    assert "abc" not in str(raised.value)
    with pytest.raises(NotFoundError):
        open_store(f"links+file://{path}.not")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x", "http:///x", "x"])
def test_links_to_anything_but_http_are_refused(tmp_path: Path, url: str) -> None:
    path, digest = tmp_path / "links.json", hashlib.sha256().hexdigest()
    objects = {keys.blob(digest): {"url": url, "size_bytes": 0, "modified": "2026-01-01T00:00:00Z"}}
    expires = "2030-01-01T00:00:00Z"
    Links.model_validate({"name": "demo", "pack": digest, "expires": expires, "objects": objects}).write(path)
    with pytest.raises(ConfigError, match="no address"):
        open_store(f"links+file://{path}")
    with pytest.raises(ConfigError, match="remove it"):
        Links.model_validate({"name": "demo", "pack": digest, "expires": expires, "objects": objects}).write(path)


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1/x?X-Amz-Signature=abc",
        "http://host:port/x?X-Amz-Signature=abc",
        "http://host:99999/x?X-Amz-Signature=abc",
        "http://host/a b?X-Amz-Signature=abc",
        "http://host/x?X-Amz-Signature=abc\r\nHost: other",
        "http://host/\u00e9?X-Amz-Signature=abc",
    ],
)
def test_addresses_that_are_none_are_refused_and_not_shown(tmp_path: Path, url: str) -> None:
    path, digest = tmp_path / "links.json", hashlib.sha256().hexdigest()
    objects = {keys.blob(digest): {"url": url, "size_bytes": 1, "modified": "2026-01-01T00:00:00Z"}}
    expires = "2030-01-01T00:00:00Z"
    Links.model_validate({"name": "demo", "pack": digest, "expires": expires, "objects": objects}).write(path)
    with pytest.raises(ConfigError, match="no address") as raised:
        open_store(f"links+file://{path}")
    assert raised.value.__cause__ is None
    assert "abc" not in str(raised.value)


def test_a_signature_reaches_no_log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAPUBLISHER")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    caplog.set_level(logging.DEBUG)
    store = open_store("s3://bucket/models", Settings(s3_endpoint_url="http://127.0.0.1:1"))
    link = store.link(keys.blob("0" * 64), 60)
    (signature,) = parse_qs(urlsplit(link).query)["X-Amz-Signature"]
    assert signature not in caplog.text


def test_how_long_is_said_and_bounded(tmp_path: Path) -> None:
    assert [parse_duration(text) for text in ("90s", "30m", "1h", "7d")] == [90, 1800, 3600, 604800]
    for text in ("", "1", "h", "1 h", "-1h", "1w", "1.5h"):
        with pytest.raises(ConfigError):
            parse_duration(text)
    store = open_store(str(tmp_path))
    for seconds in (0, 604801):
        with pytest.raises(ConfigError, match="7 days"):
            share(store, "demo", "champion", seconds)
    pack = published(store, tmp_path / "shards")
    with pytest.raises(StoreUnfitError, match="a store on S3") as raised:
        share(store, "demo", pack.digest, 60)
    assert isinstance(raised.value, ModelpressError)
