"""The manifest: one spelling, one digest, nothing that contradicts itself."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from modelpress.errors import ConfigError, CorruptionError, UnsupportedFormatError
from modelpress.manifest import MAX_EXPANSION, Manifest, canonical_json
from modelpress.pack_files import pack_file, pack_reports, read_files, read_reports, unpack_file

ONE = "1" * 64
TWO = "2" * 64


def document(**changes: Any) -> dict[str, Any]:
    tensor = {
        "name": "a.weight",
        "dtype": "F32",
        "shape": [2, 3],
        "codec": "raw",
        "raw_sha256": ONE,
        "stored_sha256": ONE,
        "stored_bytes": 24,
        "entropy_bound_bytes": 20,
        "shards": [0],
    }
    file = {
        "name": "model.onnx",
        "sha256": TWO,
        "size_bytes": 3,
        "codec": "raw",
        "stored_sha256": TWO,
        "stored_bytes": 3,
    }
    base = Manifest.model_validate(
        {
            "name": "test",
            "kind": "onnx",
            "shards": [{"sha256": ONE, "size_bytes": 100}],
            "tensors": [tensor],
            "files": [file],
            "config": {"prune": None, "x": 1.5},
        }
    ).model_dump(mode="json")
    for path, value in changes.items():
        target: Any = base
        *parents, last = path.split("__")
        for part in parents:
            target = target[int(part) if part.isdigit() else part]
        target[last] = value
    return base


def test_it_round_trips_and_its_digest_is_that_of_its_bytes() -> None:
    data = canonical_json(document())
    manifest = Manifest.parse(data)
    assert manifest.to_bytes() == data
    assert manifest.digest == hashlib.sha256(data).hexdigest()
    assert manifest.config == {"prune": None, "x": 1.5}
    assert manifest.blobs() == {ONE: 100, TWO: 3}
    assert manifest.published_bytes == 103 + len(data)
    assert manifest.raw_bytes == 24 + 3


def test_other_bytes_than_asked_for_are_refused() -> None:
    data = canonical_json(document())
    with pytest.raises(CorruptionError, match=rf"sha256 {hashlib.sha256(data).hexdigest()}\n  expected: sha256 {ONE}"):
        Manifest.parse(data, ONE)


def test_fields_of_a_later_version_are_spelled_only_where_they_are_used() -> None:
    plain = Manifest.model_validate(document())
    assert b"base" not in plain.to_bytes()
    difference = {"tensors__0__base": "a.weight", "tensors__0__codec": "zstd"}
    later = Manifest.model_validate(document(format_version=3, base=TWO, **difference))
    assert Manifest.parse(later.to_bytes()) == later
    for changes in ({"format_version": 3}, {"base": TWO}):
        with pytest.raises(ValueError, match="of version 3"):
            Manifest.model_validate(document(**changes))
    with pytest.raises(CorruptionError, match="another spelling"):
        Manifest.parse(canonical_json(document(base=None)))


@pytest.mark.parametrize("version", [4, 99])
def test_a_newer_version_is_refused(version: int) -> None:
    data = canonical_json(document(format_version=version, unheard_of={}))
    with pytest.raises(UnsupportedFormatError, match=rf"format version {version}\n.*at most 3\n.*update modelpress"):
        Manifest.parse(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": "1"}, "format version '1'"),
        ({"format_version": True}, "format version True"),
        ({"name": "../up"}, "name"),
        ({"extra": 1}, "extra"),
        ({"tensors__0__dtype": "F31"}, "tensor 'a.weight': unknown dtype 'F31'"),
        ({"tensors__0__shape": [-1]}, "shape"),
        ({"tensors__0__shape": [1] * 65}, "shape"),
        ({"tensors__0__shape": [2**40]}, rf"{4 * 2**40} raw bytes claimed from 24 stored bytes"),
        ({"tensors__0__shards": [1]}, "shard 1 of 1"),
        ({"tensors__0__shards": []}, "in no shard"),
        ({"tensors__0__shards": [0, 0]}, r"pieces in shards \[0, 0\]"),
        ({"tensors__0__stored_bytes": 101}, "101 stored bytes in shards of 100 bytes"),
        ({"tensors__0__raw_sha256": "1" * 63}, "raw_sha256"),
        ({"tensors": []}, r"tensors use shards \[\], of 1 listed"),
        ({"files__0__name": "../passwd"}, "not a relative path"),
        ({"files__0__name": "/passwd"}, "not a relative path"),
        ({"files__0__name": "a\\b"}, "not a relative path"),
        ({"files__0__name": ""}, "not a relative path"),
        ({"files__0__stored_bytes": 4}, "stored raw, yet"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptionError, match=message):
        Manifest.parse(canonical_json(document(**changes)))


def test_names_stand_once() -> None:
    twice = document()
    twice["tensors"] *= 2
    with pytest.raises(CorruptionError, match=r"tensors: 'a.weight' stands 2 times"):
        Manifest.parse(canonical_json(twice))


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"\xff", b'{"a":1,"a":2}', b'{"a":NaN}', b"[" * 100_000, b'{"a":' + b"9" * 99]
)
def test_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptionError, match="reading manifest"):
        Manifest.parse(data)


def test_another_spelling_is_refused() -> None:
    with pytest.raises(CorruptionError, match="canonical JSON"):
        Manifest.parse(json.dumps(document()).encode())


def test_what_is_no_json_is_not_written() -> None:
    with pytest.raises(ConfigError, match="writing canonical JSON"):
        canonical_json({"a": float("inf")})


@pytest.mark.parametrize(("data", "codec"), [(b"", "raw"), (b"\1\2", "raw"), (b"graph" * 99, "zstd")])
def test_files_are_packed_when_that_is_smaller(data: bytes, codec: str) -> None:
    entry, blob = pack_file("a/b.txt", data)
    assert entry.codec == codec
    assert len(blob) <= len(data)
    assert unpack_file(entry, blob) == data


def test_a_changed_file_is_refused() -> None:
    entry, blob = pack_file("a.txt", b"graph" * 99)
    with pytest.raises(CorruptionError, match=r"reading file 'a.txt'"):
        unpack_file(entry, blob[:-1])
    other = pack_file("b.txt", b"other" * 99)[1]
    lying = entry.model_copy(update={"stored_sha256": hashlib.sha256(other).hexdigest()})
    with pytest.raises(CorruptionError, match=entry.sha256):
        unpack_file(lying, other)


def test_a_file_that_claims_more_is_refused_before_it_is_opened() -> None:
    entry, blob = pack_file("a.txt", bytes(10**6))
    with pytest.raises(CorruptionError, match=r"a frame of 1000000 bytes\n  expected: 5 bytes"):
        unpack_file(entry.model_copy(update={"size_bytes": 5}), blob)


def test_files_and_reports_are_read_by_name() -> None:
    entry, blob = pack_file("a.txt", b"a" * 99)
    reports, reports_blob = pack_reports({"prune": {"zeros": 3}})
    manifest = Manifest(name="n", kind="torch", shards=(), tensors=(), files=(entry,), reports=reports)
    blobs = {entry.stored_sha256: blob, reports.stored_sha256: reports_blob}
    assert read_files(manifest, blobs.__getitem__) == {"a.txt": b"a" * 99}
    assert read_reports(manifest, blobs.__getitem__) == {"prune": {"zeros": 3}}
    assert read_reports(manifest.model_copy(update={"reports": None}), blobs.__getitem__) == {}
    with pytest.raises(ConfigError, match=r"b.txt"):
        manifest.file("b.txt")


def test_zeros_stay_under_the_cap_on_expansion() -> None:
    import zstandard

    block = bytes(2**27)
    assert len(block) < MAX_EXPANSION * len(zstandard.ZstdCompressor(level=19).compress(block))
