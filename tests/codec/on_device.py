"""Decoding on a device against the CPU's decoder, bit by bit; `test_gpu.py` runs this in processes of their own.

On a CUDA device, or with TRITON_INTERPRET=1 on the CPU. The interpreter is slow, so that most segments here are short
ones, as small chunks have them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from modelpress.codec import CODECS, Bytes, Stream, decode, gpu, kernels
from modelpress.codec.coders import encode_planes, zstd_stream
from modelpress.config import CompressConfig
from modelpress.dtypes import DTYPES, DType
from modelpress.errors import CorruptionError

BF16, I8 = DTYPES["BF16"], DTYPES["I8"]
SEGMENT = kernels.SEGMENT
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PLANES = CODECS["planes-huffman"]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


def weights(dtype: DType, count: int, seed: int = 0) -> Bytes:
    """(count · itemsize,) uint8 of bell-shaped values."""
    values = np.random.default_rng(seed).standard_normal(count) * 0.02
    if dtype.name == "BF16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").view(np.uint8)
    kinds = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I8": "<i1", "I16": "<i2", "I32": "<i4", "U64": "<u8"}
    scaled = values if dtype.is_float else np.round(np.abs(values) * 2000)
    return scaled.astype(kinds[dtype.name]).view(np.uint8)


def coded(raw: Bytes, dtype: DType, chunk_symbols: int, raw_planes: tuple[int, ...] = ()) -> list[Stream]:
    names = list(PLANES.layout(dtype))
    return encode_planes(raw, dtype, chunk_symbols, names, [plane not in raw_planes for plane in range(len(names))])


def check(raw: Bytes, streams: list[Stream], dtype: DType, chunk_symbols: int, device: torch.device) -> None:
    symbols = raw.size // dtype.itemsize
    assert np.array_equal(decode(PLANES, streams, dtype, symbols, chunk_symbols, doing="test"), raw)
    found = gpu.decode_to_device("planes-huffman", streams, dtype, symbols, chunk_symbols, device)
    assert found.device.type == device.type
    assert found.dtype == torch.uint8
    assert np.array_equal(found.cpu().numpy(), raw)


def with_body(stream: Stream, body: bytes) -> Stream:
    """The stream with other bytes, of which a last chunk may have other than before."""
    bounds = stream.bounds.copy()
    bounds[-1] = len(body)
    return Stream(stream.name, stream.coder, body, bounds)


@pytest.mark.parametrize("name", ["BF16", "F16", "F32", "F64", "I8", "I16", "I32", "U64"])
@pytest.mark.parametrize("raw_planes", [(), (1,), (0,), (0, 1, 2, 3, 4, 5, 6, 7)], ids=str)
def test_every_width_with_coded_and_raw_planes(name: str, raw_planes: tuple[int, ...], device: torch.device) -> None:
    dtype = DTYPES[name]
    raw = weights(dtype, 107)
    check(raw, coded(raw, dtype, 32, raw_planes), dtype, 32, device)


@pytest.mark.parametrize("chunk_symbols", [1, 7, 8, 9, 64])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_chunks_whose_ends_fall_beside_words_of_eight(chunk_symbols: int, extra: int, device: torch.device) -> None:
    raw = weights(BF16, 3 * chunk_symbols + extra)
    check(raw, coded(raw, BF16, chunk_symbols, (1,)), BF16, chunk_symbols, device)


@pytest.mark.parametrize(
    ("symbols", "chunk_symbols"),
    [
        (3 * SEGMENT, 2 * SEGMENT - 1),  # segments of 4096, 4095, 4096 and 1
        *([] if INTERPRETED else [(SEGMENT - 1, SEGMENT), (5 * SEGMENT, SEGMENT), (50 * SEGMENT + 9, 32 * SEGMENT)]),
    ],
)
def test_sizes_around_the_ends_of_segments_and_chunks(symbols: int, chunk_symbols: int, device: torch.device) -> None:
    raw = weights(BF16, symbols)
    check(raw, coded(raw, BF16, chunk_symbols, (1,)), BF16, chunk_symbols, device)


def test_more_segments_than_a_program_has_lanes(device: torch.device) -> None:
    raw = weights(I8, 20 * 2 * gpu.LANES + 3)
    check(raw, coded(raw, I8, 20), I8, 20, device)


def test_no_symbols_and_one(device: torch.device) -> None:
    assert gpu.decode_to_device("planes-huffman", coded(weights(BF16, 0), BF16, 64), BF16, 0, 64, device).numel() == 0
    raw = weights(BF16, 1)
    check(raw, coded(raw, BF16, 64), BF16, 64, device)


def test_a_table_of_one_symbol_takes_no_bits(device: torch.device) -> None:
    raw = np.full(300, 7, np.uint8)
    streams = coded(raw, I8, 100)
    assert streams[0].size_bytes == 3 * 8
    check(raw, streams, I8, 100, device)


def test_several_tables_between_chunks_and_between_planes(device: torch.device) -> None:
    noise = np.random.default_rng(1).integers(80, 90, 200, np.uint8)
    raw = np.concatenate(
        [np.full(200, 3, np.uint8), weights(I8, 200), noise, weights(I8, 200), np.full(150, 3, np.uint8)]
    )
    streams = coded(raw, BF16, 100)
    staged = gpu.stage_planes(streams, BF16, raw.size // 2, 100)
    assert staged.places[1] >= 3 * 4096
    check(raw, streams, BF16, 100, device)


def test_stored_chunks_between_coded_ones(device: torch.device) -> None:
    noise = np.random.default_rng(4).integers(0, 256, 300, np.uint8)
    raw = np.concatenate([np.arange(200) % 7, noise[:200], np.arange(200) % 5 + 100, noise]).astype(np.uint8)
    streams = coded(raw, I8, 100)
    stored = [bytes(chunk[4:6]) == gpu.STORED for chunk in streams[0].chunks]
    assert stored == [False, False, True, True, False, False, True, True, True]
    check(raw, streams, I8, 100, device)


def test_codes_of_the_longest_words_use_up_the_window(device: torch.device) -> None:
    """Symbols of 11 bits, one after the other, then between such of one bit: the window at its emptiest and fullest."""
    rare = np.arange(128, dtype=np.uint8)
    often = np.repeat(np.arange(200, 204, dtype=np.uint8), [1024, 512, 256, 128])
    mixed = np.random.default_rng(2).permutation(np.concatenate([rare[64:], often]))
    raw = np.concatenate([rare[:64], mixed])
    streams = coded(raw, I8, 2048)
    entries = gpu.stage_planes(streams, I8, raw.size, 2048).buffer[: 2 << kernels.MAX_BITS].view(torch.uint16)
    assert set((entries.numpy() & 255).tolist()) == {1, 2, 3, 4, kernels.MAX_BITS}
    check(raw, streams, I8, 2048, device)


@pytest.mark.parametrize("lanes", [32, 128])
def test_any_number_of_lanes_gives_the_same(lanes: int, device: torch.device) -> None:
    raw = weights(BF16, 2000)
    staged = gpu.stage_planes(coded(raw, BF16, 50, (1,)), BF16, 1000 * 2, 50)
    assert np.array_equal(staged.to(device).decode(lanes=lanes).cpu().numpy(), raw)


@pytest.mark.parametrize("offset", [0, 1, 2, 8])
def test_decodes_into_given_memory_at_any_offset(offset: int, device: torch.device) -> None:
    raw = weights(BF16, 500)
    memory = torch.full((raw.size + 64,), 99, dtype=torch.uint8, device=device)
    out = memory[16 + offset : 16 + offset + raw.size]
    found = gpu.decode_to_device("planes-huffman", coded(raw, BF16, 64, (1,)), BF16, 500, 64, device, out)
    assert found is out
    assert np.array_equal(out.cpu().numpy(), raw)
    assert bool((memory[: 16 + offset] == 99).all())
    assert bool((memory[16 + offset + raw.size :] == 99).all())


@pytest.mark.parametrize("seed", range(6))
def test_damaged_bits_never_write_outside(seed: int, device: torch.device) -> None:
    """Segments are filled with any bits: the result is wrong, and nothing around it or its scratch memory changes."""
    generator = np.random.default_rng(seed)
    raw = weights(BF16, 1000, seed)
    staged = gpu.stage_planes(coded(raw, BF16, 90, (1,)), BF16, 1000, 90)
    body = staged.buffer.numpy()[staged.places[4] + staged.raw_bytes :]
    body[:] = 255 if seed == 0 else 0 if seed == 1 else generator.integers(0, 256, body.size)
    on_device, loaded = staged.to(device), gpu._load_kernels(device)
    slots = torch.full((staged.scratch_bytes + 128,), 99, dtype=torch.uint8, device=device)
    out = torch.full((raw.size + 128,), 99, dtype=torch.uint8, device=device)
    on_device.decode_segments(loaded, slots[64:-64], gpu.LANES)
    on_device.merge(loaded, slots[64:-64], out[64:-64])
    for memory in (slots, out):
        assert bool((memory[:64] == 99).all())
        assert bool((memory[-64:] == 99).all())
    assert not np.array_equal(out[64:-64].cpu().numpy(), raw)


@pytest.mark.skipif(not INTERPRETED, reason="pages without rights are the host's; see the interpreter's run")
@pytest.mark.parametrize("damage", ["none", "ones", "noise"])
def test_nothing_is_read_beyond_the_buffer(damage: str, device: torch.device) -> None:
    """A page without rights follows the coded bytes: one word too far ends the process, and so the test."""
    raw = weights(BF16, 700)
    staged = gpu.stage_planes(coded(raw, BF16, 333, (1,)), BF16, 700, 333)
    size, page = staged.buffer.numel(), mmap.PAGESIZE
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + pages * page), page, 0) == 0
    try:
        buffer = torch.frombuffer(memory, dtype=torch.uint8, offset=pages * page - size, count=size)
        buffer.copy_(staged.buffer)
        body = buffer[staged.places[4] + staged.raw_bytes :]
        if damage == "ones":
            body.fill_(255)
        elif damage == "noise":
            body.random_(0, 256)
        found = replace(staged, buffer=buffer).decode().numpy()
        assert np.array_equal(found, raw) == (damage == "none")
    finally:
        libc.mprotect(ctypes.c_void_p(address + pages * page), page, 3)


def test_damaged_lengths_are_refused_before_anything_is_launched(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launched(*arguments: object) -> None:
        pytest.fail("launched")

    monkeypatch.setattr(gpu.StagedPlanes, "decode", launched)
    streams = coded(weights(BF16, 500), BF16, 100, (1,))
    broken = [with_body(streams[0], bytes(streams[0].body)[:-1]), streams[1]]
    with pytest.raises(CorruptionError, match="chunk 4") as raised:
        gpu.decode_to_device("planes-huffman", broken, BF16, 500, 100, device, doing="reading 'w'")
    assert "reading 'w'" in str(raised.value)
    assert "plane0" in str(raised.value)


@pytest.mark.parametrize("codec_id", ["zstd", "raw", "rle-huffman", "mask-huffman", "planes in zstandard frames"])
def test_what_is_not_decoded_on_the_device_is_decoded_before_and_copied(codec_id: str, device: torch.device) -> None:
    raw = weights(I8, 400)
    raw[np.random.default_rng(4).random(400) < 0.8] = 0
    if codec_id in CODECS:
        streams = CODECS[codec_id].encode(raw, I8, CompressConfig(chunk_symbols=4096))
    else:
        codec_id, streams = "planes-huffman", [zstd_stream("plane0", [raw], 1)]
    assert not gpu.decodes_on_device(codec_id, streams)
    out = torch.empty(400, dtype=torch.uint8, device=device)
    for into in (None, out):
        found = gpu.decode_to_device(codec_id, streams, I8, 400, 4096, device, into)
        assert found.device.type == device.type
        assert np.array_equal(found.cpu().numpy(), raw)
    assert gpu.decodes_on_device("planes-huffman", coded(raw, I8, 100))


def test_memory_that_does_not_fit_is_refused(device: torch.device) -> None:
    streams = coded(weights(I8, 100), I8, 64)
    for out in (
        torch.empty(99, dtype=torch.uint8, device=device),
        torch.empty(100, dtype=torch.int8, device=device),
        torch.empty(200, dtype=torch.uint8, device=device)[::2],
        torch.empty(100, dtype=torch.uint8, device="meta"),
    ):
        with pytest.raises(ValueError, match="100 contiguous bytes"):
            gpu.decode_to_device("planes-huffman", streams, I8, 100, 64, device, out)
