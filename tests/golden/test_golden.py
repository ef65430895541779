"""Packs of every format version stay readable, by this library and by a reader written from FORMAT.md alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelpress import keys
from modelpress.codec import CODECS
from modelpress.container import read_tensors
from modelpress.container.tensors import to_bytes
from modelpress.dtypes import DTYPES
from modelpress.manifest import FORMAT_VERSION, Manifest, read_files, read_reports
from tests.golden import second_reader
from tests.golden.make_golden import tensors

HERE = Path(__file__).parent
DIGESTS = {
    1: "a55c805c1c7e755d7f8af54abecd4ffa1ba43a979e77a1fe5f4d4c4afd1a5e87",
    2: "e42d1acf7762a68270e967e2dbf273aae5a60fa77397f82ce7b93feebd31a7f2",
}
VERSIONS = pytest.mark.parametrize("version", DIGESTS)


def store(version: int) -> Path:
    return HERE / f"v{version}"


def manifest_of(version: int) -> Manifest:
    digest = DIGESTS[version]
    return Manifest.parse((store(version) / keys.manifest("golden", digest)).read_bytes(), digest)


@VERSIONS
def test_a_pack_holds_every_codec_and_splits(version: int) -> None:
    manifest = manifest_of(version)
    assert manifest.format_version == version
    codecs = {tensor.codec for tensor in manifest.tensors}
    assert codecs == (set(CODECS) if version > 1 else set(CODECS) - {"mask-huffman"})
    split = {tensor.codec for tensor in manifest.tensors if len(tensor.shards) > 1}
    assert {"raw", "planes-huffman"} <= split
    assert max(shard.size_bytes for shard in manifest.shards) <= 20_000
    assert {file.codec for file in manifest.files} == {"raw", "zstd"}


def test_every_version_has_its_pack() -> None:
    assert set(DIGESTS) == set(range(1, FORMAT_VERSION + 1))


@VERSIONS
def test_every_version_stays_readable(version: int) -> None:
    manifest, expected = manifest_of(version), tensors(version)

    def fetch(digest: str) -> bytes:
        return (store(version) / keys.blob(digest)).read_bytes()

    found = dict(read_tensors(manifest, fetch))
    assert list(found) == [tensor.name for tensor in manifest.tensors]
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert to_bytes(found[name]).tobytes() == to_bytes(tensor).tobytes()
    assert read_files(manifest, fetch) == {"labels.txt": b"zero\none\n" * 40, "raw.bin": b"\0\1"}
    assert set(read_reports(manifest, fetch)) == {"compress", "shard"}
    assert manifest.metadata == {"a": None}


@VERSIONS
def test_the_second_reader_reads_the_same(version: int) -> None:
    _, found, files = second_reader.read_pack(store(version), "golden", DIGESTS[version])
    expected = tensors(version)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        dtype, shape, raw = found[name]
        assert DTYPES[dtype].itemsize == tensor.element_size()
        assert shape == list(tensor.shape)
        assert raw == to_bytes(tensor).tobytes()
    assert files["labels.txt"] == b"zero\none\n" * 40
