"""Every codec gives back every bit, for every dtype, shape and value."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from modelpress.codec import CODECS, Bytes, Stream, bound_bytes, decode
from modelpress.codec.planes import merge, split
from modelpress.codec.runlength import gaps_of, positions_of
from modelpress.config import CompressConfig
from modelpress.container.tensors import TORCH_DTYPES, from_bytes, to_bytes
from modelpress.dtypes import DTYPES, DType
from modelpress.errors import CorruptionError

CHUNK = 4096
CONFIG = CompressConfig(chunk_symbols=CHUNK, zstd_level=1)


def round_trip(codec_id: str, raw: Bytes, dtype: DType) -> tuple[list[Stream], Bytes]:
    codec, symbols = CODECS[codec_id], raw.size // dtype.itemsize
    streams = codec.encode(raw, dtype, CONFIG)
    chunk = max(symbols, 1) if codec_id == "raw" else CHUNK
    return streams, decode(codec, streams, dtype, symbols, chunk, doing="test")


@st.composite
def raw_bytes(draw: st.DrawFn, itemsize: int) -> Bytes:
    """Elements as anything between dense noise and all zeros, with lengths around the chunk borders."""
    symbols = draw(st.sampled_from([0, 1, 2, 255, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    raw = generator.integers(0, draw(st.sampled_from([1, 3, 256])), symbols * itemsize, dtype=np.uint8)
    keep = generator.random(symbols) < draw(st.sampled_from([0.0, 0.001, 0.1, 1.0]))
    return np.ascontiguousarray((raw.reshape(-1, itemsize) * keep[:, None]).reshape(-1).astype(np.uint8))


@pytest.mark.parametrize("codec_id", list(CODECS))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=lambda dtype: dtype.name)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_every_bit_comes_back(codec_id: str, dtype: DType, data: st.DataObject) -> None:
    raw = data.draw(raw_bytes(dtype.itemsize))
    streams, decoded = round_trip(codec_id, raw, dtype)
    assert np.array_equal(decoded, raw)
    assert [stream.name for stream in streams] == list(CODECS[codec_id].layout(dtype))


@pytest.mark.parametrize("dtype", TORCH_DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5, 7), (2, 3, 4, 5)])
def test_tensor_bytes_round_trip(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    raw = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8)
    tensor = from_bytes(
        raw.reshape(-1).numpy().copy(), DTYPES[next(n for n, d in TORCH_DTYPES.items() if d == dtype)], shape
    )
    assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape)
    assert to_bytes(tensor).tobytes() == raw.numpy().tobytes()


def test_a_transposed_tensor_is_stored_row_major() -> None:
    tensor = torch.arange(12.0).reshape(3, 4).t()
    assert to_bytes(tensor).tobytes() == tensor.contiguous().numpy().tobytes()


@pytest.mark.parametrize("codec_id", list(CODECS))
def test_odd_floats_keep_their_bits(codec_id: str) -> None:
    patterns = [0x7FC00001, 0xFFC12345, 0x00000001, 0x80000000, 0x7F800000, 0xFF800000, 0x807FFFFF, 0]
    raw = np.array(patterns * 700, "<u4").view(np.uint8)
    assert np.array_equal(round_trip(codec_id, raw, DTYPES["F32"])[1], raw)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=lambda dtype: dtype.name)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_planes_undo_themselves(dtype: DType, data: st.DataObject) -> None:
    raw = data.draw(hnp.arrays(np.uint8, st.integers(0, 40).map(lambda n: n * dtype.itemsize)))
    out = np.empty_like(raw)
    merge(split(raw, dtype), dtype, out)
    assert np.array_equal(out, raw)


def test_the_first_plane_of_bf16_is_its_exponent() -> None:
    value = torch.tensor([-1.5, 2.0**-20, 3.0]).bfloat16()
    exponent = split(to_bytes(value), DTYPES["BF16"])[0]
    assert exponent.tolist() == [127, 127 - 20, 128]


@given(st.sets(st.integers(0, 3000), max_size=60))
def test_gaps_undo_themselves(positions: set[int]) -> None:
    rising = np.array(sorted(positions), np.int64)
    gaps = gaps_of(rising)
    assert np.array_equal(positions_of(gaps), rising)
    assert gaps.size <= 3001


def test_minus_zero_is_a_value_of_a_sparse_tensor() -> None:
    tensor = torch.zeros(CHUNK)
    tensor[17] = -0.0
    raw = to_bytes(tensor)
    _, decoded = round_trip("rle-huffman", raw, DTYPES["F32"])
    assert np.array_equal(decoded, raw)
    assert decoded.view("<u4")[17] == 0x80000000


def test_bf16_weights_reach_the_bound_of_their_exponent() -> None:
    raw = to_bytes((torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16())
    streams = CODECS["planes-huffman"].encode(raw, DTYPES["BF16"], CompressConfig())
    stored = sum(stream.size_bytes for stream in streams)
    assert [stream.coder for stream in streams] == ["zstd", "raw"]
    bound = bound_bytes(raw, DTYPES["BF16"])
    assert bound <= stored <= 1.02 * bound


def test_noise_costs_next_to_nothing() -> None:
    raw = np.random.default_rng(0).integers(0, 256, 1 << 18, dtype=np.uint8)
    streams = CODECS["planes-huffman"].encode(raw, DTYPES["I8"], CONFIG)
    assert sum(stream.size_bytes for stream in streams) == raw.size


def sparse_streams() -> list[Stream]:
    raw = np.zeros(CHUNK, np.uint8)
    raw[::10] = 7
    return CODECS["rle-huffman"].encode(raw, DTYPES["I8"], CONFIG)


def test_fewer_values_than_gaps_is_refused() -> None:
    gaps, _ = sparse_streams()
    _, other = CODECS["rle-huffman"].encode(np.eye(1, CHUNK, dtype=np.uint8)[0], DTYPES["I8"], CONFIG)
    with pytest.raises(CorruptionError, match="410 gaps for values of"):
        decode(CODECS["rle-huffman"], [gaps, other], DTYPES["I8"], CHUNK, CHUNK, doing="test")


def test_gaps_beyond_the_chunk_are_refused() -> None:
    with pytest.raises(CorruptionError, match=f"position {CHUNK - 6} of {CHUNK - 100}"):
        decode(CODECS["rle-huffman"], sparse_streams(), DTYPES["I8"], CHUNK - 100, CHUNK, doing="test")


@pytest.mark.parametrize("codec_id", ["zstd", "planes-huffman"])
def test_a_frame_that_claims_more_is_refused_before_it_is_opened(codec_id: str) -> None:
    raw = np.zeros(CHUNK * 4, np.uint8)
    streams = CODECS[codec_id].encode(raw, DTYPES["F32"], CONFIG)
    with pytest.raises(CorruptionError, match=r"found: \d+ bytes\n  expected: \d+ bytes"):
        decode(CODECS[codec_id], streams, DTYPES["F32"], CHUNK - 1, CHUNK, doing="test")
