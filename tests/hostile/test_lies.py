"""Lies that pass the checks of lengths: a stream in another codec's coder, shapes beyond memory, odd manifests."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard

from modelpress.container import decode_piece, read_pieces, read_tensors
from modelpress.container.safetensors_file import Entry, compact, read, write
from modelpress.errors import CorruptionError
from modelpress.manifest import Manifest
from tests.hostile.every_codec import make, pack_of, store_as

CAP = 2**22
"""More than any refusal here may allocate."""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(make(tmp_path_factory.mktemp("shards"))[0][0].to_bytes())
    return document


def shard(codec: str, shape: list[int], streams: list[tuple[dict[str, Any], bytes]], **changes: Any) -> bytes:
    """One coded tensor `t` of bytes."""
    info = {"dtype": "U8", "shape": shape, "codec": codec, "sha256": "0" * 64, "chunk_symbols": 4096, "start": 0}
    info |= {"count": shape[0], "streams": [described for described, _ in streams], **changes}
    entries = [Entry(f"t#{described['name']}", "U8", (len(body),), [body]) for described, body in streams]
    return b"".join(write(entries, {"modelpress": compact({"format_version": 2, "tensors": {"t": info}})}))


def frame(size: int) -> bytes:
    return zstandard.ZstdCompressor().compress(bytes(size))


def claiming(size: int, length: int) -> bytes:
    """A frame of so many bytes whose header claims a content of `size` bytes."""
    head = bytes.fromhex("28b52ffde0") + size.to_bytes(8, "little")
    return head + bytes(length - len(head))


def decoded(data: bytes) -> list[bytes]:
    pieces = read_pieces(*read(data, "reading"), "reading")
    return [decode_piece(piece, f"reading tensor {piece.name!r}").tobytes() for piece in pieces]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (shard("zstd", [100], [({"name": "data", "coder": "raw"}, claiming(2**40, 100))]), "coder 'raw'\n.*: zstd"),
        (shard("zstd", [10], [({"name": "data", "coder": "raw"}, frame(1)[:10])]), "coder 'raw'\n.*: zstd"),
        (
            shard("raw", [400], [({"name": "raw", "coder": "zstd", "lengths": [len(frame(400))]}, frame(400))]),
            "coder 'zstd'\n.*: raw",
        ),
        (
            shard("mask-huffman", [8], [({"name": n, "coder": "raw"}, bytes(8)) for n in ("mask", "values0")]),
            "coder 'raw'",
        ),
        *[
            (
                shard("zstd", [9000], [({"name": "data", "coder": "zstd", "lengths": [30] * 3}, body * 3)]),
                "chunk 0\n.*without its content size",
            )
            for body in (bytes.fromhex("28b52ffd0058").ljust(30, b"\0"), claiming(2**64 - 2, 30))
        ],
        (
            shard("zstd", [4096 << 30], [({"name": "data", "coder": "zstd", "lengths": []}, b"")]),
            "0 chunks\n  expected: 1073741824",
        ),
    ],
)
def test_a_coder_that_the_codec_does_not_have_is_refused(data: bytes, message: str) -> None:
    tracemalloc.start()
    with pytest.raises(CorruptionError, match=rf"tensor 't'(.|\n)*{message}"):
        decoded(data)
    assert tracemalloc.get_traced_memory()[1] < CAP
    tracemalloc.stop()


def test_a_body_in_chunks_of_one_symbol_takes_no_multiple_of_its_bytes() -> None:
    body = bytes(50_000)
    data = shard("planes-huffman", [len(body)], [({"name": "plane0", "coder": "raw"}, body)], chunk_symbols=1)
    decoded(data)  # imports what it needs
    tracemalloc.start()
    assert decoded(data) == [body]
    assert tracemalloc.get_traced_memory()[1] < 20 * len(body)
    tracemalloc.stop()


def spelled(document: dict[str, Any], **changes: Any) -> bytes:
    return json.dumps(document | changes, sort_keys=True, separators=(",", ":")).encode()


def nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


@pytest.mark.parametrize(
    "changes",
    [{"metadata": {"a": "\ud800"}}, {"metadata": {"\ud800": 1}}, {"licence": "\ud800"}, {"\ud800": 1}]
    + [{"metadata": {"a": nested(depth)}} for depth in (300, 900)],
    ids=lambda changes: next(iter(changes)).encode("ascii", "replace").decode(),
)
def test_a_manifest_that_cannot_be_spelled_again_is_corrupt(manifest: dict[str, Any], changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptionError, match="reading manifest"):
        Manifest.parse(spelled(manifest, **changes))


@pytest.mark.parametrize("shape", [[2**62, 2**62, 0], [0, 2**63 - 1, 2**63 - 1], [2**61, 4, 0]])
def test_an_empty_tensor_whose_strides_overflow_is_refused(manifest: dict[str, Any], shape: list[int]) -> None:
    tensors = [manifest["tensors"][0] | {"shape": shape}, *manifest["tensors"][1:]]
    with pytest.raises(CorruptionError, match="beyond any memory"):
        Manifest.parse(spelled(manifest, tensors=tensors))


@pytest.mark.timeout(30)
def test_many_tensors_of_which_two_share_a_name_are_refused_in_time(manifest: dict[str, Any]) -> None:
    one = manifest["tensors"][0]
    tensors = [one | {"name": f"t{number}"} for number in range(50_000)] + [one | {"name": "t49999"}]
    with pytest.raises(CorruptionError, match="'t49999' stands 2 times"):
        Manifest.parse(spelled(manifest, tensors=tensors))


def test_an_empty_tensor_of_a_great_shape_is_read(tmp_path: Path) -> None:
    """What is refused above is refused for its strides, not for its axes."""
    found, blobs = pack_of(tmp_path, [store_as("a", torch.zeros(2**40, 0), "raw"), store_as("b", torch.ones(2), "raw")])
    assert dict(read_tensors(Manifest.parse(found.to_bytes()), blobs.__getitem__))["a"].shape == (2**40, 0)


def test_many_wrong_lengths_are_one_refusal() -> None:
    """A validator that lists every fault would take a thousand times the bytes of the file."""
    stream = {"name": "data", "coder": "zstd", "lengths": [-1] * 100_000}
    data = shard("zstd", [100], [(stream, frame(100))])
    tracemalloc.start()
    with pytest.raises(CorruptionError, match=r"streams\.0\.lengths\.0"):
        decoded(data)
    assert tracemalloc.get_traced_memory()[1] < 20 * len(data)
    tracemalloc.stop()


def test_many_wrong_tensors_of_a_manifest_are_one_refusal(manifest: dict[str, Any]) -> None:
    data = spelled(manifest, tensors=[{}] * 100_000, shards=[{}] * 100_000, files=[0] * 100_000)
    tracemalloc.start()
    with pytest.raises(CorruptionError, match=r"shards\.0\.sha256"):
        Manifest.parse(data)
    assert tracemalloc.get_traced_memory()[1] < 100 * len(data)
    tracemalloc.stop()
