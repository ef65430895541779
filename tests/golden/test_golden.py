"""Packs of every format version stay readable, by this library and by a reader written from FORMAT.md alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelpress import keys
from modelpress.codec import CODECS
from modelpress.cipher import LocalKey, opener
from modelpress.container import Base, read_tensors
from modelpress.container.tensors import to_bytes
from modelpress.dtypes import DTYPES
from modelpress.manifest import FORMAT_VERSION, Manifest
from modelpress.pack_files import read_files, read_reports
from modelpress.store import open_store
from tests.golden import second_reader
from tests.golden.make_golden import WRAPPING_KEY, tensors

HERE = Path(__file__).parent
DIGESTS = {
    "v1": "a55c805c1c7e755d7f8af54abecd4ffa1ba43a979e77a1fe5f4d4c4afd1a5e87",
    "v2": "e42d1acf7762a68270e967e2dbf273aae5a60fa77397f82ce7b93feebd31a7f2",
    "v2-stored": "0e42694f2e9b16d08473a3ecc21b8f3ad9c696c0e70b42a915d475d88d825c4f",
    "v3-delta": "3095036ad629a763d3f7e49fe5fc6c9d9669dc2b846bf7e1457a5dbb0cd98798",
    "v3-encrypted": "b8e25d080f61334281c1d35b5f972164ab385f708474c7a4b57482f457e57ad8",
}
PACKS = pytest.mark.parametrize("pack", DIGESTS)


def store(pack: str) -> Path:
    return HERE / pack


def manifest_of(pack: str) -> Manifest:
    digest = DIGESTS[pack]
    return Manifest.parse((store(pack) / keys.manifest("golden", digest)).read_bytes(), digest)


@pytest.mark.parametrize("pack", ["v1", "v2"])
def test_a_pack_holds_every_codec_and_splits(pack: str) -> None:
    manifest = manifest_of(pack)
    codecs = {tensor.codec for tensor in manifest.tensors}
    assert codecs == (set(CODECS) if pack == "v2" else set(CODECS) - {"mask-huffman"})
    split = {tensor.codec for tensor in manifest.tensors if len(tensor.shards) > 1}
    assert {"raw", "planes-huffman"} <= split
    assert max(shard.size_bytes for shard in manifest.shards) <= 20_000
    assert {file.codec for file in manifest.files} == {"raw", "zstd"}


def test_every_version_has_its_pack() -> None:
    assert {manifest_of(pack).format_version for pack in DIGESTS} == set(range(1, FORMAT_VERSION + 1))


def test_one_pack_is_stored_as_the_difference_to_another() -> None:
    manifest = manifest_of("v3-delta")
    kinds = {(entry.base is not None, bool(entry.shards)) for entry in manifest.tensors}
    assert kinds == {(True, False), (True, True), (False, True)}
    differences = [entry for entry in manifest.tensors if entry.base is not None and entry.shards]
    assert {entry.codec for entry in differences} == {"planes-huffman", "rle-huffman", "zstd"}
    assert len({entry.dtype for entry in differences}) > 6
    assert [entry.base for entry in manifest.tensors if entry.name == "renamed.bits"] == ["random.bits"]


def test_one_pack_has_streams_with_stored_and_with_coded_chunks() -> None:
    kinds: dict[str, set[bool]] = {}
    for shard in manifest_of("v2-stored").shards:
        entries, pieces = second_reader.read_shard((store("v2-stored") / keys.blob(shard.sha256)).read_bytes())
        for name, piece in pieces.items():
            for stream in piece["streams"]:
                body, at = entries[f"{name}#{stream['name']}"][2], 0
                for length in stream["lengths"] if stream["coder"] == "huffman" else ():
                    kinds.setdefault(f"{piece['codec']} {stream['name']}", set()).add(body[at + 4 : at + 6] == b"\1\0")
                    at += length
    assert kinds["planes-huffman plane0"] == kinds["planes-huffman plane3"] == {False, True}
    assert {True} in [found for name, found in kinds.items() if "values" in name]


@PACKS
def test_every_version_stays_readable(pack: str) -> None:
    manifest, expected = manifest_of(pack), tensors(pack)

    opener_of = opener(open_store(str(store(pack))), manifest, [LocalKey(WRAPPING_KEY)])

    def fetch(digest: str) -> bytes:
        data, sealed = (store(pack) / keys.blob(digest)).read_bytes(), opener_of(digest, "opening")
        return sealed.open(data) if sealed else data

    base = None
    if manifest.base is not None:
        data = (store(pack) / keys.manifest("golden", manifest.base)).read_bytes()
        base = Base(manifest, Manifest.parse(data, manifest.base), fetch)
    found = dict(read_tensors(manifest, fetch, original=base))
    assert list(found) == [tensor.name for tensor in manifest.tensors]
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert to_bytes(found[name]).tobytes() == to_bytes(tensor).tobytes()
    assert read_files(manifest, fetch) == {"labels.txt": b"zero\none\n" * 40, "raw.bin": b"\0\1"}
    assert set(read_reports(manifest, fetch)) == {"compress", "shard"}
    assert manifest.metadata == {"a": None}


@PACKS
def test_the_second_reader_reads_the_same(pack: str) -> None:
    _, found, files = second_reader.read_pack(store(pack), "golden", DIGESTS[pack], WRAPPING_KEY)
    expected = tensors(pack)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        dtype, shape, raw = found[name]
        assert DTYPES[dtype].itemsize == tensor.element_size()
        assert shape == list(tensor.shape)
        assert raw == to_bytes(tensor).tobytes()
    assert files["labels.txt"] == b"zero\none\n" * 40
