"""Packs of every format version stay readable, by this library and by a reader written from FORMAT.md alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelpress import keys
from modelpress.codec import CODECS
from modelpress.container import read_tensors
from modelpress.container.tensors import to_bytes
from modelpress.dtypes import DTYPES
from modelpress.manifest import Manifest, read_files, read_reports
from tests.golden import second_reader
from tests.golden.make_golden import tensors

HERE = Path(__file__).parent
V1 = HERE / "v1"
DIGEST = "a55c805c1c7e755d7f8af54abecd4ffa1ba43a979e77a1fe5f4d4c4afd1a5e87"


def fetch(digest: str) -> bytes:
    return (V1 / keys.blob(digest)).read_bytes()


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return Manifest.parse((V1 / keys.manifest("golden", DIGEST)).read_bytes(), DIGEST)


def test_version_1_holds_every_codec_and_splits(manifest: Manifest) -> None:
    assert {tensor.codec for tensor in manifest.tensors} == set(CODECS)
    split = {tensor.codec for tensor in manifest.tensors if len(tensor.shards) > 1}
    assert {"raw", "planes-huffman"} <= split
    assert max(shard.size_bytes for shard in manifest.shards) <= 20_000
    assert {file.codec for file in manifest.files} == {"raw", "zstd"}


def test_version_1_stays_readable(manifest: Manifest) -> None:
    expected = tensors()
    found = dict(read_tensors(manifest, fetch))
    assert list(found) == [tensor.name for tensor in manifest.tensors]
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert to_bytes(found[name]).tobytes() == to_bytes(tensor).tobytes()
    assert read_files(manifest, fetch) == {"labels.txt": b"zero\none\n" * 40, "raw.bin": b"\0\1"}
    assert set(read_reports(manifest, fetch)) == {"compress", "shard"}
    assert manifest.metadata == {"a": None}


def test_the_second_reader_reads_the_same() -> None:
    _, found, files = second_reader.read_pack(V1, "golden", DIGEST)
    expected = tensors()
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        dtype, shape, raw = found[name]
        assert DTYPES[dtype].itemsize == tensor.element_size()
        assert shape == list(tensor.shape)
        assert raw == to_bytes(tensor).tobytes()
    assert files["labels.txt"] == b"zero\none\n" * 40
