"""Every codec gives back every bit, for every dtype, shape and value."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpress.codec import CODECS, Bytes, Stream, bound_bytes, decode
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
    assert [stream.coder for stream in streams] == ["huffman", "raw"]
    bound = bound_bytes(raw, DTYPES["BF16"])
    assert bound <= stored <= 1.02 * bound


def test_noise_costs_next_to_nothing() -> None:
    raw = np.random.default_rng(0).integers(0, 256, 1 << 18, dtype=np.uint8)
    streams = CODECS["planes-huffman"].encode(raw, DTYPES["I8"], CONFIG)
    assert sum(stream.size_bytes for stream in streams) == raw.size


def sparse_streams(codec_id: str) -> list[Stream]:
    raw = np.zeros(CHUNK, np.uint8)
    raw[::10] = 7
    return CODECS[codec_id].encode(raw, DTYPES["I8"], CONFIG)


@pytest.mark.parametrize("codec_id", ["rle-huffman", "mask-huffman"])
def test_fewer_values_than_places_is_refused(codec_id: str) -> None:
    index, _ = sparse_streams(codec_id)
    _, other = CODECS[codec_id].encode(np.eye(1, CHUNK, dtype=np.uint8)[0], DTYPES["I8"], CONFIG)
    with pytest.raises(CorruptionError, match=r"chunk 0\n  found: .*positions and values that do not fit the chunk"):
        decode(CODECS[codec_id], [index, other], DTYPES["I8"], CHUNK, CHUNK, doing="test")


@pytest.mark.parametrize("codec_id", ["rle-huffman", "mask-huffman"])
def test_places_beyond_the_chunk_are_refused(codec_id: str) -> None:
    with pytest.raises(CorruptionError, match=r"do(es)? not fit|expected: at most"):
        decode(CODECS[codec_id], sparse_streams(codec_id), DTYPES["I8"], CHUNK - 100, CHUNK, doing="test")


@pytest.mark.parametrize("codec_id", ["zstd", "planes-huffman"])
def test_a_chunk_that_claims_more_is_refused_before_it_is_opened(codec_id: str) -> None:
    raw = np.zeros(CHUNK * 4, np.uint8)
    streams = CODECS[codec_id].encode(raw, DTYPES["F32"], CONFIG)
    with pytest.raises(CorruptionError, match=r"found: \d+ bytes\n  expected: \d+ bytes"):
        decode(CODECS[codec_id], streams, DTYPES["F32"], CHUNK - 1, CHUNK, doing="test")
