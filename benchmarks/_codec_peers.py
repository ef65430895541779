"""The peers of `codecs`: each codes and decodes one array through its own Python package, on one thread.

A peer gets the array in the form that suits it best: blosc2 its element's size, pcodec numbers, zipnn the dtype's
name, and the two that are slow, dahuffman and constriction, the byte planes of a sample from all over the array.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks._openzl import GRAPHS, Worker
from benchmarks._peer import Entrant, PeerError, cpu_seconds
from modelpress.codec import Bytes
from modelpress.codec.base import WORDS
from modelpress.dtypes import DType

SAMPLE_BYTES = 1_000_000
SAMPLE_RUNS = 64
SLOW_ROUNDS = 2
ZIPNN_DTYPES = {"BF16": "bfloat16", "F32": "float32", "F16": "float16", "F8_E4M3": "float8_e4m3fn"}
PCODEC_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.int16, "I8": np.int8}


@dataclass(frozen=True)
class Coder:
    """How a package is called. `prepare` gives what `encode` takes, and is not timed."""

    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
    prepare: Callable[[], Any]
    size: Callable[[Any], int] = len


@dataclass(frozen=True)
class Peer:
    """A system: the package it needs, and its coder for an array, or None where it has none for the dtype."""

    name: str
    package: str
    coder: Callable[[Bytes, DType], Coder | None]
    sample: int | None = None
    """Bytes of the array that it codes; None: all."""


def enter(peers: Sequence[Peer], raw: Bytes, dtype: DType) -> Iterator[Entrant]:
    """All that can code this dtype; one that is not installed enters as a failure that says so."""
    for peer in peers:
        data = _sample(raw, dtype, peer.sample) if peer.sample else raw
        name = f"{peer.name}, {data.size / 1e6:.2g} MB" if data.size < raw.size else peer.name
        if importlib.util.find_spec(peer.package) is None:
            yield Entrant(peer.name, 0, 0, {}, failure="not installed")
        elif (coder := peer.coder(data, dtype)) is not None:
            yield _entrant(name, data, coder, SLOW_ROUNDS if peer.sample else None)


def _sample(raw: Bytes, dtype: DType, size: int) -> Bytes:
    """About `size` bytes: SAMPLE_RUNS runs of elements at even distances."""
    step = raw.size // dtype.itemsize // SAMPLE_RUNS * dtype.itemsize
    run = size // dtype.itemsize // SAMPLE_RUNS * dtype.itemsize
    if run >= step:
        return raw
    return np.ascontiguousarray(raw[: SAMPLE_RUNS * step].reshape(SAMPLE_RUNS, step)[:, :run]).reshape(-1)


def _entrant(name: str, data: Bytes, coder: Coder, max_rounds: int | None) -> Entrant:
    coded = coder.encode(coder.prepare())
    if not np.array_equal(np.frombuffer(coder.decode(coded), np.uint8), data):
        return Entrant(name, 0, 0, {}, failure="decodes to other bytes")

    def encode() -> float:
        prepared = coder.prepare()
        return cpu_seconds(lambda: coder.encode(prepared))

    works = {"encode": encode, "decode": lambda: cpu_seconds(lambda: coder.decode(coded))}
    return Entrant(name, data.size, coder.size(coded), works, max_rounds)


def enter_openzl(raw: Bytes, dtype: DType, path: Path, stack: ExitStack) -> Iterator[Entrant]:
    """OpenZL's graphs, each in a process of its own that ends with the stack; `path` is for the array's bytes."""
    if importlib.util.find_spec("openzl") is None:
        yield Entrant("openzl", 0, 0, {}, failure="not installed")
        return
    raw.tofile(path)
    for graph in GRAPHS:
        name = f"openzl {graph}"
        worker = stack.enter_context(Worker(graph, dtype.name, path))
        try:
            stored = worker.stored_bytes()
        except PeerError as error:
            yield Entrant(name, 0, 0, {}, failure=str(error))
            continue
        works = {work: _asked(worker, work) for work in ("encode", "decode")}
        yield Entrant(name, raw.size, stored, works, SLOW_ROUNDS if graph == "auto" else None)


def _asked(worker: Worker, work: str) -> Callable[[], float]:
    return lambda: worker.seconds(work)


def _zstd(level: int) -> Callable[[Bytes, DType], Coder]:
    def coder(raw: Bytes, dtype: DType) -> Coder:  # noqa: ARG001
        import zstandard

        encoder, decoder = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
        return Coder(encoder.compress, decoder.decompress, raw.tobytes)

    return coder


def _planes_zstd(raw: Bytes, dtype: DType) -> Coder | None:
    """Byte planes by numpy, a frame each."""
    import zstandard

    if dtype.itemsize == 1:
        return None
    encoder, decoder = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()

    def encode(data: Bytes) -> list[bytes]:
        return [encoder.compress(plane.data) for plane in _planes(data, dtype)]

    def decode(frames: list[bytes]) -> Bytes:
        out = np.empty((raw.size // dtype.itemsize, dtype.itemsize), np.uint8)
        for plane, frame in enumerate(frames):
            out[:, plane] = np.frombuffer(decoder.decompress(frame), np.uint8)
        return out.reshape(-1)

    return Coder(encode, decode, lambda: raw, lambda frames: sum(map(len, frames)))


def _planes(data: Bytes, dtype: DType) -> list[Bytes]:
    words = data.reshape(-1, dtype.itemsize)
    return [np.ascontiguousarray(words[:, plane]) for plane in range(dtype.itemsize)]


def _lz4(raw: Bytes, dtype: DType) -> Coder:  # noqa: ARG001
    block = importlib.import_module("lz4.block")
    return Coder(block.compress, block.decompress, raw.tobytes)


def _blosc2(raw: Bytes, dtype: DType) -> Coder:
    blosc2 = importlib.import_module("blosc2")
    options = {"typesize": dtype.itemsize, "clevel": 1, "codec": blosc2.Codec.ZSTD, "nthreads": 1}
    shuffle = [blosc2.Filter.SHUFFLE]
    return Coder(
        lambda data: blosc2.compress2(data, filters=shuffle, **options),
        lambda coded: blosc2.decompress2(coded, nthreads=1),
        lambda: raw,
    )


def _zipnn(raw: Bytes, dtype: DType) -> Coder | None:
    if dtype.name not in ZIPNN_DTYPES:
        return None
    zipnn = importlib.import_module("zipnn")
    coder = zipnn.ZipNN(input_format="byte", bytearray_dtype=ZIPNN_DTYPES[dtype.name], threads=1)
    # It reorders the bytes of its input in place: each run gets a copy, made outside of what is timed.
    return Coder(coder.compress, coder.decompress, lambda: bytearray(raw.tobytes()))


def _pcodec(raw: Bytes, dtype: DType) -> Coder:
    pcodec = importlib.import_module("pcodec")
    config = pcodec.ChunkConfig(enable_8_bit=True)
    numbers = raw.view(PCODEC_DTYPES.get(dtype.name, WORDS[dtype.itemsize]))
    return Coder(
        lambda data: pcodec.standalone.simple_compress(data, config),
        lambda coded: pcodec.standalone.simple_decompress(coded).view(np.uint8),
        lambda: numbers,
    )


def _dahuffman(raw: Bytes, dtype: DType) -> Coder:
    dahuffman = importlib.import_module("dahuffman")

    def encode(data: Bytes) -> list[tuple[Any, bytes]]:
        coders = [(dahuffman.HuffmanCodec.from_data(plane.tobytes()), plane) for plane in _planes(data, dtype)]
        return [(coder, coder.encode(plane.tobytes())) for coder, plane in coders]

    def decode(coded: list[tuple[Any, bytes]]) -> Bytes:
        return _merged([np.frombuffer(bytes(coder.decode(body)), np.uint8) for coder, body in coded])

    return Coder(encode, decode, lambda: raw, lambda coded: sum(len(body) for _, body in coded))


def _constriction(raw: Bytes, dtype: DType) -> Coder:
    """Range ANS with a fixed distribution for each plane."""
    constriction = importlib.import_module("constriction")
    stack, categorical = constriction.stream.stack, constriction.stream.model.Categorical

    def encode(data: Bytes) -> list[tuple[Any, npt.NDArray[np.uint32]]]:
        coded = []
        for plane in _planes(data, dtype):
            # Its models need two symbols or more, each with some probability.
            counts = np.maximum(np.bincount(plane, minlength=256), 1e-3)
            model = categorical((counts / counts.sum()).astype(np.float32), perfect=False)
            ans = stack.AnsCoder()
            ans.encode_reverse(plane.astype(np.int32), model)
            coded.append((model, ans.get_compressed()))
        return coded

    def decode(coded: list[tuple[Any, npt.NDArray[np.uint32]]]) -> Bytes:
        count = raw.size // dtype.itemsize
        return _merged([stack.AnsCoder(words).decode(model, count).astype(np.uint8) for model, words in coded])

    return Coder(encode, decode, lambda: raw, lambda coded: sum(words.nbytes for _, words in coded))


def _merged(planes: list[Bytes]) -> Bytes:
    return planes[0] if len(planes) == 1 else np.stack(planes, axis=1).reshape(-1)


def peers(sample: int = SAMPLE_BYTES) -> list[Peer]:
    """All but OpenZL, which needs a process; see `enter_openzl`."""
    return [
        Peer("zstd-1", "zstandard", _zstd(1)),
        Peer("zstd-9", "zstandard", _zstd(9)),
        Peer("byte planes + zstd-1", "zstandard", _planes_zstd),
        Peer("lz4", "lz4", _lz4),
        Peer("blosc2 shuffle + zstd-1", "blosc2", _blosc2),
        Peer("zipnn", "zipnn", _zipnn),
        Peer("pcodec", "pcodec", _pcodec),
        Peer("dahuffman", "dahuffman", _dahuffman, sample),
        Peer("constriction ANS", "constriction", _constriction, sample),
    ]
