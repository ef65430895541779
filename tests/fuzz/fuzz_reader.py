"""Coverage-guided fuzzing of the reader with atheris (libFuzzer): `make fuzz`.

Every input must be read or refused with a FormatError: another exception, a crash, an input of over ten seconds, or an
allocation beyond the cap (address space, set when the target is warm) ends the run with the input saved. The first
byte of an input chooses what it is:

    0  a shard: the header's JSON, two zero bytes, the tensors' bytes
    1  a manifest
    2  one tensor's description over its streams: JSON, two zero bytes, the streams' bytes
    3  coded chunks for the compiled loops, without JSON in the way

What is decoded is held to the manifest's rule (`MAX_EXPANSION`) and to DECODED_BYTES, as `read_tensors` does before it
allocates. `python -m tests.fuzz.fuzz_reader CORPUS [libFuzzer's options]` writes the seeds into CORPUS if it is empty.
"""

from __future__ import annotations

import contextlib
import json
import random
import resource
import sys
from dataclasses import replace
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["modelpress.codec", "modelpress.container", "modelpress.manifest", "modelpress.strictjson"],
    exclude=["modelpress.codec.kernels"],  # numba compiles them from their bytecode as it stands
):
    from modelpress.codec import CODECS, Stream, decode
    from modelpress.container import Piece, decode_piece, read_pieces
    from modelpress.container.safetensors_file import Entry, compact, read, write
    from modelpress.manifest import MAX_EXPANSION, Manifest

import numpy as np

from modelpress.config import CompressConfig
from modelpress.dtypes import DTYPES
from modelpress.errors import FormatError
from tests.fuzz.json_mutator import mutate

GOLDEN = Path(__file__).parents[1] / "golden"
CAP_BYTES = 2**29
"""Address space beyond that of the warm target."""
DECODED_BYTES = 2**22
FEW = 200
"""Elements of a small seed."""
MARK = b"\0\0"
DTYPE_NAMES = list(DTYPES)
CODEC_NAMES = list(CODECS)
CODERS = ("raw", "zstd", "huffman")
STREAMS = [f"{name}{number}" for name in ("plane", "values") for number in range(8)]
WORDS = [*DTYPE_NAMES, *CODEC_NAMES, *CODERS, *STREAMS, "gaps", "mask", "data", "lengths", "streams", "t", "t#plane0"]


def check(data: bytes) -> None:
    """Read one input; whatever escapes from here is a finding."""
    if data:
        with contextlib.suppress(FormatError):
            TARGETS[data[0] % len(TARGETS)](data[1:])


def check_shard(data: bytes) -> None:
    header, _, body = data.partition(MARK)
    decode_all(len(header).to_bytes(8, "little") + header + body)


def check_manifest(data: bytes) -> None:
    assert Manifest.parse(data).to_bytes() == data


def check_piece(data: bytes) -> None:
    """The description names lengths; its streams are cut from what follows in that order."""
    text, _, body = data.partition(MARK)
    try:
        info = json.loads(text)
        streams = [(str(s["name"]), int(s.get("size") or sum(s["lengths"]))) for s in info["streams"]]
        for stream in info["streams"]:
            stream.pop("size", None)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return
    entries, at = [], 0
    for name, size in streams:
        if not 0 <= size <= len(body) - at:
            return
        entries.append(Entry(f"t#{name}", "U8", (size,), [body[at : at + size]]))
        at += size
    description = {"format_version": 2, "tensors": {"t": info}}
    decode_all(b"".join(write(entries, {"modelpress": compact(description)})))


def decode_all(shard: bytes) -> None:
    entries, metadata = read(shard, "fuzzing")
    for piece in read_pieces(entries, metadata, "fuzzing"):
        size = piece.count * piece.dtype.itemsize
        if size <= min(DECODED_BYTES, piece.stored_bytes * MAX_EXPANSION):
            assert decode_piece(piece, "fuzzing").size == size


def check_chunks(data: bytes) -> None:
    """Eight bytes choose codec, dtype, coders and symbols; each chunk is led by two bytes with its length."""
    if len(data) < 8:
        return
    codec, dtype = CODECS[CODEC_NAMES[data[0] % len(CODEC_NAMES)]], DTYPES[DTYPE_NAMES[data[1] % len(DTYPE_NAMES)]]
    kinds, symbols, chunk_symbols = (int.from_bytes(data[at : at + 2], "little") for at in (2, 4, 6))
    chunk_symbols += 1
    chunks, names, at = -(-symbols // chunk_symbols), list(codec.layout(dtype)), 8
    if chunks > 64:
        return
    parts: list[list[bytes]] = [[] for _ in names]
    for chunk in range(chunks * len(names)):
        size = int.from_bytes(data[at : at + 2], "little")
        parts[chunk % len(names)].append(data[at + 2 : at + 2 + size])
        at += 2 + size
    streams = [
        Stream.of(name, CODERS[(kinds >> 2 * number & 3) % len(CODERS)], part)
        for number, (name, part) in enumerate(zip(names, parts, strict=True))
    ]
    guarded = np.full(symbols * dtype.itemsize + 128, 99, np.uint8)
    out = guarded[64 : 64 + symbols * dtype.itemsize]
    try:
        decode(codec, streams, dtype, symbols, chunk_symbols, doing="fuzzing", out=out)
    finally:
        assert (guarded[:64] == 99).all()
        assert (guarded[64 + out.size :] == 99).all()


TARGETS = (check_shard, check_manifest, check_piece, check_chunks)


def mutate_input(data: bytes, most: int, seed: int) -> bytes:
    """libFuzzer's own mutations, and as often as not a change of the JSON's sense."""
    source = random.Random(seed)
    if data and data[0] % len(TARGETS) != 3 and source.random() < 0.5:
        data = data[:1] + mutate(data[1:], MARK, WORDS, source)[: most - 1]
        if source.random() < 0.7:
            return data
    return bytes(atheris.Mutate(data, most))


def seeds() -> list[bytes]:
    """Inputs of every kind that are read without a complaint, from the golden packs and their smallest tensors."""
    found = []
    for version in sorted(GOLDEN.glob("v*")):
        found += [b"\1" + path.read_bytes() for path in version.glob("packs/*/*.json")]
        for path in version.glob("blobs/sha256/*"):
            data = path.read_bytes()
            with contextlib.suppress(FormatError):
                entries, metadata = read(data, "making seeds")
                end = 8 + int.from_bytes(data[:8], "little")
                found.append(b"\0" + data[8:end].rstrip() + MARK + data[end:])
                pieces = read_pieces(entries, metadata, "making seeds")
                found += [seed for piece in pieces for seed in seeds_of(piece)]
    return found


def seeds_of(piece: Piece) -> list[bytes]:
    """Two chunks of a piece, and its first elements in chunks of a few: as a description over streams, and bare."""
    if piece.is_plain or piece.codec == "raw":
        return []
    cut = piece.cut(piece.start, min(piece.count, 2 * piece.chunk_symbols))
    raw = decode_piece(cut, "making seeds")[: FEW * piece.dtype.itemsize]
    config = CompressConfig.model_construct(chunk_symbols=FEW // 2, zstd_level=3)
    streams = CODECS[piece.codec].encode(raw, piece.dtype, config)
    count = raw.size // piece.dtype.itemsize
    few = replace(cut, streams=streams, chunk_symbols=FEW // 2, count=count)
    return [seed for part in (cut, few) for seed in (described(part), bare(part))]


def described(piece: Piece) -> bytes:
    info = piece.describe() | {"start": 0, "shape": [piece.count]}
    for stream, about in zip(piece.streams, info["streams"], strict=True):
        if stream.coder == "raw":
            about["size"] = stream.size_bytes
    body = b"".join(bytes(stream.body)[: stream.size_bytes] for stream in piece.streams)
    return b"\2" + compact(info).encode() + MARK + body


def bare(piece: Piece) -> bytes:
    coders = sum(CODERS.index(stream.coder) << 2 * number for number, stream in enumerate(piece.streams))
    head = bytes([CODEC_NAMES.index(piece.codec), DTYPE_NAMES.index(piece.dtype.name)])
    numbers = (coders & 0xFFFF, piece.count, piece.chunk_symbols - 1)
    chunks = [len(chunk).to_bytes(2, "little") + bytes(chunk) for chunk in piece.ordered_chunks()]
    return b"\3" + head + b"".join(number.to_bytes(2, "little") for number in numbers) + b"".join(chunks)


def main(arguments: list[str]) -> None:
    corpus = Path(arguments[1])
    corpus.mkdir(parents=True, exist_ok=True)
    made = seeds()
    for seed in made:
        check(seed)  # compiles the loops, so that the cap is set upon a warm process
    if not any(corpus.iterdir()):
        for number, seed in enumerate(made):
            (corpus / f"seed-{number:03d}").write_bytes(seed)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    cap = pages * resource.getpagesize() + CAP_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (cap, cap))
    atheris.Setup(
        [*arguments[:2], "-timeout=10", "-rss_limit_mb=0", "-max_len=24000", *arguments[2:]],
        check,
        custom_mutator=mutate_input,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
