"""Any tensor goes through compress, shards and read_tensors bit by bit: every dtype, shape, layout and bit pattern."""

from __future__ import annotations

import tempfile
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpress.checkpoint import Checkpoint
from modelpress.codec import CODECS
from modelpress.compress import compress
from modelpress.config import CompressConfig, ShardConfig
from modelpress.container import read_tensors
from modelpress.container.tensors import TORCH_DTYPES, to_bytes
from modelpress.manifest import Manifest
from modelpress.shard import draft_manifest, write_shards
from tests.hostile.every_codec import Pack, pack_of, store_as

CODED = CompressConfig(chunk_symbols=4096, min_decode_bytes_per_second=0)
WORDS = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<u8"}
INTERESTING = {  # quiet and signalling NaNs with payloads, infinities, denormals, −0.0, by itemsize
    1: [0x7F, 0xFF, 0x7E, 0x01, 0x80, 0x00],
    2: [0x7FC1, 0x7F81, 0xFFFF, 0x7C01, 0xFC00, 0x0001, 0x8001, 0x8000, 0x0000],
    4: [0x7FC00001, 0x7F800001, 0xFFFFFFFF, 0x7F800000, 0x00000001, 0x80000001, 0x80000000, 0],
    8: [0x7FF8000000000001, 0x7FF0000000000001, 2**64 - 1, 0x7FF0000000000000, 1, 2**63 + 1, 2**63, 0],
}

shapes = st.one_of(
    st.just(()),
    st.lists(st.integers(0, 6), min_size=1, max_size=5).map(tuple),
    st.tuples(st.sampled_from([1, 4095, 4096, 4097, 9000])),
)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Random words, interesting ones and zeros; contiguous, transposed, strided, reversed in axes or expanded."""
    dtype = TORCH_DTYPES[draw(st.sampled_from(sorted(TORCH_DTYPES)))]
    shape, width = draw(shapes), dtype.itemsize
    source = np.random.default_rng(draw(st.integers(0, 2**32)))
    words = source.integers(0, 2 ** (8 * width), prod(shape), WORDS[width], endpoint=False)
    few = np.array(INTERESTING[width], WORDS[width])
    kind = draw(st.sampled_from(["random", "interesting", "mixed", "sparse"]))
    if kind != "random":
        words = np.where(source.random(words.size) < {"mixed": 0.5}.get(kind, 1), source.choice(few, words.size), words)
    if kind == "sparse":
        words = np.where(source.random(words.size) < 0.9, words.dtype.type(0), words)
    if dtype == torch.bool:
        words = words & 1
    tensor = torch.from_numpy(words.copy()).view(dtype).reshape(shape)
    layout = draw(st.sampled_from(["plain", "transposed", "strided", "expanded"]))
    if layout == "transposed":
        return tensor.permute(tuple(reversed(range(tensor.dim()))))
    if layout == "strided" and tensor.dim():
        return torch.stack([tensor, tensor], -1)[..., 1]
    return tensor.expand(3, *shape) if layout == "expanded" else tensor


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    flat[:] = tensor.reshape(-1)
    return tensor.dtype, tuple(tensor.shape), bytes(flat.view(torch.uint8).numpy().data)


def read_back(pack: Pack) -> dict[str, torch.Tensor]:
    manifest, blobs = pack
    return dict(read_tensors(Manifest.parse(manifest.to_bytes(), manifest.digest), blobs.__getitem__))


@given(found=st.lists(tensors(), min_size=1, max_size=4), limit=st.sampled_from([60_000, 2**26]), coded=st.booleans())
@settings(max_examples=250, deadline=None)
def test_any_tensor_comes_back(found: list[torch.Tensor], limit: int, coded: bool) -> None:
    named = {f"t.{number}": tensor for number, tensor in enumerate(found)}
    model, _ = compress(Checkpoint("torch", named), CODED if coded else None)
    with tempfile.TemporaryDirectory() as folder:
        shards, _ = write_shards(model, ShardConfig(max_shard_size=limit), Path(folder))
        blobs = {shard.sha256: shard.path.read_bytes() for shard in shards}
    again = read_back((draft_manifest("any", model, shards)[0], blobs))
    assert {name: bits(tensor) for name, tensor in again.items()} == {name: bits(t) for name, t in named.items()}


@pytest.mark.parametrize("codec", CODECS)
@given(tensor=tensors(), chunk_symbols=st.sampled_from([1, 7, 256, 4096]))
@settings(max_examples=60, deadline=None)
def test_any_tensor_comes_back_from_any_codec(codec: str, tensor: torch.Tensor, chunk_symbols: int) -> None:
    """Also from those that `compress` would not choose for it."""
    if not tensor.numel():
        return
    with tempfile.TemporaryDirectory() as folder:
        pack = pack_of(Path(folder), [store_as("t", tensor, codec, max(chunk_symbols, tensor.numel() // 64))], 60_000)
    assert pack[0].tensors[0].codec == codec
    assert bits(read_back(pack)["t"]) == bits(tensor)


@pytest.mark.parametrize("dtype", sorted(TORCH_DTYPES))
def test_every_dtype_keeps_every_interesting_bit_pattern(dtype: str, tmp_path: Path) -> None:
    kind = TORCH_DTYPES[dtype]
    words = np.array(INTERESTING[kind.itemsize] * 300, WORDS[kind.itemsize])
    tensor = torch.from_numpy(words & 1 if kind == torch.bool else words).view(kind)
    for codec in CODECS:
        again = read_back(pack_of(tmp_path / codec, [store_as("t", tensor, codec)], 60_000))["t"]
        assert bits(again) == bits(tensor)
        assert to_bytes(again).tobytes() == to_bytes(tensor).tobytes()
