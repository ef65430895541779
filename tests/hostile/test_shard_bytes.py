"""Shards from a hand that means harm, or from a failing disk: refused, with names and numbers, before allocation."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpress.checkpoint import Checkpoint
from modelpress.compress import compress
from modelpress.config import CompressConfig, ShardConfig
from modelpress.container import read_tensors
from modelpress.container.safetensors_file import read
from modelpress.errors import CorruptionError, FormatError, UnsupportedFormatError
from modelpress.manifest import Manifest
from modelpress.shard import draft_manifest, write_shards

CAP = 8 * 2**20
"""More than any refusal here may allocate."""


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, dict[str, bytes]]:
    generator = torch.Generator().manual_seed(0)
    dense = (torch.randn(30_000, generator=generator) * 0.02).bfloat16()
    sparse = dense * (torch.rand(30_000, generator=generator) < 0.1)
    tensors = {"a.dense": dense, "b.sparse": sparse, "c.plain": torch.arange(40.0)}
    coded, _ = compress(Checkpoint("torch", tensors), CompressConfig(chunk_symbols=4096))
    shards, _ = write_shards(coded, ShardConfig(max_shard_size=25_000), tmp_path_factory.mktemp("shards"))
    assert len(shards) > 2
    return draft_manifest("pack", coded, shards)[0], {shard.sha256: shard.path.read_bytes() for shard in shards}


def read_all(manifest: Manifest, blobs: dict[str, bytes]) -> None:
    for _ in read_tensors(manifest, blobs.__getitem__):
        pass


def with_shard(
    manifest: Manifest, blobs: dict[str, bytes], position: int, data: bytes
) -> tuple[Manifest, dict[str, bytes]]:
    """A pack whose manifest vouches for `data` as one of its shards: only the format can refuse it now."""
    digest = hashlib.sha256(data).hexdigest()
    shards = list(manifest.shards)
    shards[position] = shards[position].model_copy(update={"sha256": digest, "size_bytes": len(data)})
    return manifest.model_copy(update={"shards": tuple(shards)}), blobs | {digest: data}


def edited(data: bytes, edit: Callable[[dict[str, Any]], Any]) -> bytes:
    """The shard with its description changed by `edit`."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    description = json.loads(header["__metadata__"].get("modelpress", "{}"))
    edit(description)
    header["__metadata__"]["modelpress"] = json.dumps(description)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def file_of(header: dict[str, Any] | bytes, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def test_any_flipped_bit_is_found(pack: tuple[Manifest, dict[str, bytes]]) -> None:
    manifest, blobs = pack
    generator = np.random.default_rng(0)
    for shard in manifest.shards:
        data = bytearray(blobs[shard.sha256])
        for position in [*range(64), *generator.integers(0, len(data), 100)]:
            data[position] ^= 1 << int(generator.integers(8))
            with pytest.raises(CorruptionError, match=shard.sha256):
                read_all(manifest, blobs | {shard.sha256: bytes(data)})
            data[:] = blobs[shard.sha256]


def test_a_flipped_bit_that_the_manifest_vouches_for_is_found(pack: tuple[Manifest, dict[str, bytes]]) -> None:
    """Even with a matching shard digest, the tensors' own digests hold."""
    generator = np.random.default_rng(1)
    manifest, blobs = pack
    for position, shard in enumerate(manifest.shards):
        data = blobs[shard.sha256]
        begin = 8 + int.from_bytes(data[:8], "little")
        for at in generator.integers(begin, len(data), 60):
            changed = data[:at] + bytes([data[at] ^ 1 << int(generator.integers(8))]) + data[at + 1 :]
            with pytest.raises(CorruptionError, match=r"tensor '[abc]"):
                read_all(*with_shard(manifest, blobs, position, changed))


@pytest.mark.parametrize("cut", [0, 7, 8, 100, -1])
def test_a_truncated_shard_is_refused(pack: tuple[Manifest, dict[str, bytes]], cut: int) -> None:
    manifest, blobs = pack
    shard = manifest.shards[0].sha256
    with pytest.raises(CorruptionError, match=rf"expected: {len(blobs[shard])} bytes"):
        read_all(manifest, blobs | {shard: blobs[shard][:cut]})
    with pytest.raises(CorruptionError):
        read_all(*with_shard(manifest, blobs, 0, blobs[shard][:cut]))


def test_swapped_shards_are_refused(pack: tuple[Manifest, dict[str, bytes]]) -> None:
    manifest, blobs = pack
    first, second = manifest.shards[0].sha256, manifest.shards[1].sha256
    with pytest.raises(CorruptionError, match=first):
        read_all(manifest, blobs | {first: blobs[second], second: blobs[first]})
    swapped = manifest.model_copy(update={"shards": (manifest.shards[1], manifest.shards[0], *manifest.shards[2:])})
    with pytest.raises(CorruptionError, match=r"elements from \d+\n  expected: elements from 0"):
        read_all(swapped, blobs)


def test_a_missing_tensor_and_one_too_many_are_refused(pack: tuple[Manifest, dict[str, bytes]]) -> None:
    manifest, blobs = pack
    renamed = [t.model_copy(update={"name": "x"}) if t.name == "c.plain" else t for t in manifest.tensors]
    with pytest.raises(CorruptionError, match=r"tensor 'x'.*\n  found: no such tensor in the shard"):
        read_all(manifest.model_copy(update={"tensors": tuple(renamed)}), blobs)
    fewer = tuple(tensor for tensor in manifest.tensors if tensor.name != "c.plain")
    with pytest.raises(CorruptionError, match=r"found: tensor 'c.plain'"):
        read_all(manifest.model_copy(update={"tensors": fewer}), blobs)


def piece(description: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = description["tensors"]["a.dense"]
    return found


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(format_version=0), "format version 0"),
        (lambda d: d.update(more=1), "expected: format_version and tensors"),
        (lambda d: d.update(tensors=[]), "expected: format_version and tensors"),
        (lambda d: piece(d).update(more=1), "more: Extra inputs"),
        (lambda d: piece(d).update(dtype="F99"), "dtype 'F99'"),
        (lambda d: piece(d).update(dtype="F32"), "streams"),
        (lambda d: piece(d).update(shape=[30_001]), "in whole chunks|30001"),
        (lambda d: piece(d).update(shape=[2**60]), "1152921504606846976"),
        (lambda d: piece(d).update(count=2**40, shape=[2**40]), r"chunks\n  expected: 268435456"),
        (lambda d: piece(d).update(count=0), "elements 0 to 0 of 30000"),
        (lambda d: piece(d).update(count=1.5), "count"),
        (lambda d: piece(d).update(start=4095), "elements 4095"),
        (lambda d: piece(d).update(start=-4096), "start"),
        (lambda d: piece(d).update(chunk_symbols=0), "chunk_symbols"),
        (lambda d: piece(d).update(chunk_symbols=2**25), "chunk_symbols"),
        (lambda d: piece(d).update(chunk_symbols=2**24), "elements|chunks"),
        (lambda d: piece(d)["streams"].pop(), "streams"),
        (lambda d: piece(d)["streams"].reverse(), "streams"),
        (lambda d: piece(d)["streams"][0].update(coder="lzma"), "coder"),
        (lambda d: piece(d)["streams"][0].update(coder="raw"), "coder 'raw'"),
        (lambda d: piece(d).update(sha256="0" * 64), "sha256 0{64}\n  expected: sha256 "),
        (lambda d: piece(d)["streams"][0]["lengths"].append(1), "chunks"),
        (lambda d: piece(d)["streams"][0].update(lengths=[2**62] * 6), "chunks|bytes"),
        (lambda d: piece(d).update(codec="rle-huffman"), "streams"),
        (lambda d: d["tensors"].update(other=piece(d)), "nothing"),
        (lambda d: d["tensors"].clear(), "tensor 'a.dense'"),
    ],
)
def test_a_lying_description_is_refused(pack: tuple[Manifest, dict[str, bytes]], edit: Any, message: str) -> None:
    manifest, blobs = pack
    data = edited(blobs[manifest.shards[0].sha256], edit)
    tracemalloc.start()
    with pytest.raises(CorruptionError, match=message):
        read_all(*with_shard(manifest, blobs, 0, data))
    assert tracemalloc.get_traced_memory()[1] < CAP
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(format_version=3), "format version 3"),
        (lambda d: piece(d).update(codec="planes-ans"), r"a.dense.*\n  found: codec 'planes-ans'\n.*raw, zstd"),
    ],
)
def test_what_a_newer_release_wrote_is_refused(
    pack: tuple[Manifest, dict[str, bytes]], edit: Any, message: str
) -> None:
    manifest, blobs = pack
    data = edited(blobs[manifest.shards[0].sha256], edit)
    with pytest.raises(UnsupportedFormatError, match=message):
        read_all(*with_shard(manifest, blobs, 0, data))


def test_a_small_shard_that_claims_terabytes_is_refused(pack: tuple[Manifest, dict[str, bytes]]) -> None:
    """Chunks whose frames are tiny and claim 128 TiB in all: refused at the first frame's own header."""
    manifest, blobs = pack
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(2**20))
    streams = [{"name": "data", "coder": "zstd", "lengths": [len(bomb)] * 8}]
    count = 8 * 2**24
    shape = {"dtype": "F64", "shape": [count], "codec": "zstd", "sha256": manifest.tensors[0].raw_sha256}
    info = shape | {"chunk_symbols": 2**24, "start": 0, "count": count, "streams": streams}
    body = bomb * 8
    header = {
        "__metadata__": {"modelpress": json.dumps({"format_version": 1, "tensors": {"a.dense": info}})},
        "a.dense#data": {"dtype": "U8", "shape": [len(body)], "data_offsets": [0, len(body)]},
    }
    entry = manifest.tensors[0].model_copy(
        update={"dtype": "F64", "shape": (count,), "codec": "zstd", "stored_bytes": len(body), "shards": (0,)}
    )
    only = manifest.model_copy(update={"tensors": (entry,), "shards": manifest.shards[:1]})
    tracemalloc.start()
    with pytest.raises(CorruptionError, match=rf"{2**20} bytes\n  expected: {2**27} bytes"):
        read_all(*with_shard(only, blobs, 0, file_of(header, body)))
    assert tracemalloc.get_traced_memory()[1] < CAP
    tracemalloc.stop()


def entry(start: int, end: int, **changes: Any) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]} | changes


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes"),
        ((2**63).to_bytes(8, "little") + b"{}", "header of 9223372036854775808 bytes"),
        (file_of(b"[]"), "a JSON object"),
        (file_of(b"{"), "strict JSON"),
        (file_of(b"[" * 200_000), "strict JSON"),
        (
            file_of(b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}'),
            "a number of 5000 digits",
        ),
        (file_of(b'{"a":1,"a":2}'), "key 'a' stands 2 times"),
        (file_of({"__metadata__": {"a": 1}}), "texts by name"),
        (file_of({"a": entry(0, 4)}, b"123"), "bytes 0 to 4"),
        (file_of({"a": entry(0, 3)}, b"1234"), "4 bytes of tensors"),
        (file_of({"a": entry(0, 2), "b": entry(3, 4)}, b"1234"), "tensor 'b'\n.*a hole: it begins at byte 3\n.*byte 2"),
        (file_of({"a": entry(0, 3), "b": entry(2, 4)}, b"1234"), "tensor 'b'\n.*an overlap: .*2\n.*byte 3"),
        (file_of({"a": entry(0, 4, dtype="F32", shape=[2])}, b"1234"), "4 bytes\n.*8 for F32"),
        (file_of({"a": entry(0, 4, dtype="F3")}, b"1234"), "dtype 'F3'"),
        (file_of({"a": entry(0, 4, shape=[-4])}, b"1234"), "shape"),
        (file_of({"a": entry(0, 4, shape=[True] * 4)}, b"1234"), "shape"),
        (file_of({"a": entry(0, 4, shape=[2**32, 2**32])}, b"1234"), f"{2**64} for"),
        (file_of({"a": entry(0, 1, shape=[1] * 65)}, b"1"), "shape"),
        (file_of({"a": entry(0, 1, data_offsets=[0])}, b"1"), "1 data_offsets"),
        (file_of({"a": entry(0, 1, more=1)}, b"1"), "dtype, shape and data_offsets"),
        (file_of({"a": []}, b""), "dtype, shape and data_offsets"),
    ],
)
def test_a_file_that_is_no_safetensors_file_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(CorruptionError, match=message):
        read(data, "reading a shard")


@given(noise=st.binary(max_size=400), header=st.booleans())
@settings(max_examples=300, deadline=None)
def test_noise_is_refused_and_nothing_else_happens(noise: bytes, header: bool) -> None:
    with contextlib.suppress(FormatError):
        read(file_of(noise) if header else noise, "reading noise")


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_mutated_shards_are_read_right_or_refused(pack: tuple[Manifest, dict[str, bytes]], data: st.DataObject) -> None:
    """Headers and bodies mutated at will, vouched for by the manifest: the digests of the tensors decide."""
    manifest, blobs = pack
    position = data.draw(st.integers(0, len(manifest.shards) - 1))
    shard = bytearray(blobs[manifest.shards[position].sha256])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(shard), 1200) - 1))
        shard[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    with contextlib.suppress(FormatError):
        read_all(*with_shard(manifest, blobs, position, bytes(shard)))


def test_the_pack_that_all_this_is_done_to_is_sound(pack: tuple[Manifest, dict[str, bytes]]) -> None:
    manifest, blobs = pack
    read_all(manifest, blobs)
    read_all(*with_shard(manifest, blobs, 0, edited(blobs[manifest.shards[0].sha256], dict.copy)))


def test_a_stream_that_is_no_u8_tensor_is_refused(pack: tuple[Manifest, dict[str, bytes]]) -> None:
    manifest, blobs = pack
    data = blobs[manifest.shards[0].sha256]
    changed = data.replace(b'"a.dense#plane0":{"dtype":"U8"', b'"a.dense#plane0":{"dtype":"I8"', 1)
    assert changed != data
    with pytest.raises(CorruptionError, match=r"stream 'a.dense#plane0'\n  found: I8"):
        read_all(*with_shard(manifest, blobs, 0, changed))
