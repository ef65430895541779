"""Any single flipped bit of a pack is found, whether or not the shards' own digests still tell of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from modelpress.codec import CODECS
from modelpress.container import read_pieces, read_tensors
from modelpress.container.safetensors_file import read
from modelpress.container.tensors import to_bytes
from modelpress.errors import CorruptionError, UnsupportedFormatError
from modelpress.manifest import Manifest
from tests.hostile.every_codec import Pack, make

FLIPS = 10_000
STEP = 7919
"""Bits from one flip to the next; a prime, so that no bit of a byte is left out."""


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> list[Pack]:
    return make(tmp_path_factory.mktemp("shards"))


def tensors_of(manifest: Manifest, blobs: dict[str, bytes]) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    found = read_tensors(manifest, blobs.__getitem__, threads=1)
    return {name: (tensor.dtype, tensor.shape, to_bytes(tensor).tobytes()) for name, tensor in found}


def flips(packs: list[Pack]) -> Iterator[tuple[int, int, bytes]]:
    """A pack, a position among its shards, and that shard with one bit flipped: FLIPS of them, spread over all."""
    places = [(number, position) for number, pack in enumerate(packs) for position in range(len(pack[0].shards))]
    shards = [packs[number][1][packs[number][0].shards[position].sha256] for number, position in places]
    ends = np.cumsum([8 * len(shard) for shard in shards])
    for number in range(FLIPS):
        bit = number * STEP % int(ends[-1])
        which = int(np.searchsorted(ends, bit, side="right"))
        data = bytearray(shards[which])
        at = bit - int(ends[which]) + 8 * len(data)
        data[at // 8] ^= 1 << at % 8
        yield *places[which], bytes(data)


def test_the_packs_use_every_codec_and_every_coder(packs: list[Pack]) -> None:
    shards = [data for _, blobs in packs for data in blobs.values()]
    pieces = [piece for data in shards for piece in read_pieces(*read(data, "test"), "test")]
    assert {piece.codec for piece in pieces} == set(CODECS)
    assert {stream.coder for piece in pieces for stream in piece.streams} == {"raw", "zstd", "huffman"}
    cut = {tensor.codec for manifest, _ in packs for tensor in manifest.tensors if len(tensor.shards) > 1}
    assert cut == {"raw", "planes-huffman"}
    assert all(len(tensors_of(*pack)) == len(pack[0].tensors) for pack in packs)
    assert 8 * sum(len(data) for data in shards) > FLIPS


def test_every_flipped_bit_is_found(packs: list[Pack]) -> None:
    found = 0
    for number, position, data in flips(packs):
        manifest, blobs = packs[number]
        shard = manifest.shards[position].sha256
        with pytest.raises((CorruptionError, UnsupportedFormatError), match=shard):
            tensors_of(manifest, blobs | {shard: data})
        found += 1
    assert found == FLIPS


def test_a_flipped_bit_with_a_matching_shard_digest_changes_no_tensor(packs: list[Pack]) -> None:
    """The manifest vouches for the damaged shard: what then holds are the format and the tensors' own digests."""
    expected = [tensors_of(*pack) for pack in packs]
    refused = same = 0
    for number, position, data in flips(packs):
        manifest, blobs = packs[number]
        digest = hashlib.sha256(data).hexdigest()
        shards = list(manifest.shards)
        shards[position] = shards[position].model_copy(update={"sha256": digest})
        changed = manifest.model_copy(update={"shards": tuple(shards)})
        try:
            found = tensors_of(changed, blobs | {digest: data})
        except (CorruptionError, UnsupportedFormatError):
            refused += 1
        else:
            assert found == expected[number]
            same += 1
    assert refused + same == FLIPS
    assert same < FLIPS // 100  # in `"format":"pt"`, which our reader does not need


def test_a_flipped_bit_of_the_manifest_is_found(packs: list[Pack]) -> None:
    manifest, _ = packs[0]
    data = manifest.to_bytes()
    for bit in range(0, 8 * len(data), 13):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises((CorruptionError, UnsupportedFormatError)):
            Manifest.parse(bytes(changed), manifest.digest)
