"""Lossless coding against its peers: `python -m benchmarks.codecs [--quick] [--json PATH] [--write]`.

`--write` keeps the table in `benchmarks/results/` and draws `docs/img/codecs.svg`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from benchmarks._codec_cases import Case, cases
from benchmarks._codec_figure import draw
from benchmarks._codec_peers import Peer, enter, enter_openzl, peers
from benchmarks._peer import Entrant, cpu_seconds, race
from benchmarks._report import Row, main
from modelpress.checkpoint import Checkpoint
from modelpress.codec import CODECS, Bytes, bound_bytes
from modelpress.compress import compress
from modelpress.config import CompressConfig
from modelpress.container import Piece, decode_piece
from modelpress.container.tensors import dtype_of, to_bytes
from modelpress.cores import usable_cores
from modelpress.dtypes import DType

NOTE = """\
Each case is one flat array of all matrices of a model, so that start-up per tensor is not in it: those of a pretrained
sentence encoder (22.7M parameters), and of a perceptron trained in the run. One thread, CPU time of the process. In
each of five rounds (one with `--quick`) every system encodes and decodes once, one after the other, and its least time
counts. Three are slow and run in two rounds: `openzl auto`, and dahuffman and constriction, which code a sample of
64 runs from all over the array. Every output is decoded and compared. What cannot code a dtype is left out of its case.

`modelpress` is the codec that `compress` chooses, its encoder and decoder alone; `whole stage` adds trying all codecs,
hashing and the proof by decoding, once. `decode` goes into memory that the system allocates, as with all peers;
`decode, given` into memory that was touched before, as a loader does. `memcpy` copies into such memory. `order-0 bound`
is the entropy of the byte planes of the whole array; a coder with a table per chunk, or that sees zeros or repeats, can
go under it. `bits` are per weight.
"""
FIGURE = Path(__file__).parents[1] / "docs" / "img" / "codecs.svg"
QUICK_WEIGHTS = 600_000
QUICK_SAMPLE = 25_600
ROUNDS = 5
THREADS = (1, 2)
COLD_SYMBOLS = 1_000_000
COLD_STARTS = 3
COLD = """
import sys, time
marks = [time.perf_counter()]
import modelpress
marks.append(time.perf_counter())
import modelpress.codec.kernels
marks.append(time.perf_counter())
from pathlib import Path
from modelpress.container import Coded, decode_piece
piece = Coded.from_bytes(Path(sys.argv[1]).read_bytes()).tensors[0].piece
marks.append(time.perf_counter())
decode_piece(piece, "a first decode")
marks.append(time.perf_counter())
print(marks[1] - marks[0], marks[2] - marks[1], marks[4] - marks[3])
"""


def measure(quick: bool) -> Iterator[Row]:
    """Rows of all cases."""
    torch.set_num_threads(1)
    rounds = 1 if quick else ROUNDS
    field = peers(QUICK_SAMPLE) if quick else peers()
    for number, case in enumerate(cases(QUICK_WEIGHTS if quick else None)):
        yield from case_rows(case, rounds, field, openzl=True)
        if number == 0:
            yield from thread_rows(case, rounds)
    yield from cold_rows(1 if quick else COLD_STARTS)


def case_rows(case: Case, rounds: int, field: Sequence[Peer], *, openzl: bool) -> Iterator[Row]:
    """One array: its bound, modelpress, the peers, a copy."""
    raw, dtype = to_bytes(case.tensor), dtype_of(case.name, case.tensor)
    bound = bound_bytes(raw, dtype)
    yield Row(case.name, "order-0 bound", "ratio", "", raw.size / bound)
    yield Row(case.name, "order-0 bound", "bits", "", 8 * bound / case.weights)
    ours, stage_seconds = _ours(case, raw, dtype)
    copy = _copying(raw)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        entrants = [ours, *enter(field, raw, dtype)]
        if openzl:
            entrants += enter_openzl(raw, dtype, Path(folder) / "raw", stack)
        race([*entrants, copy], rounds)
    for entrant in entrants:
        yield from _rows(case, entrant, copy)
    yield Row(case.name, "modelpress", "whole stage", "GB/s", raw.size / stage_seconds / 1e9)
    yield Row(case.name, "memcpy", "decode", "GB/s", _giga(copy.rate("decode")))


def _rows(case: Case, entrant: Entrant, copy: Entrant) -> Iterator[Row]:
    name = f"{entrant.name} ({entrant.failure})" if entrant.failure else entrant.name
    failed, decode, memcpy = entrant.failure is not None, entrant.rate("decode"), copy.rate("decode")
    ratio = None if failed else entrant.raw_bytes / entrant.stored_bytes
    yield Row(case.name, name, "ratio", "", ratio)
    if ratio is not None:
        yield Row(case.name, name, "bits", "", 8 * case.tensor.nbytes / case.weights / ratio)
    yield Row(case.name, name, "encode", "GB/s", _giga(entrant.rate("encode")))
    yield Row(case.name, name, "decode", "GB/s", _giga(decode))
    if decode and memcpy:
        yield Row(case.name, name, "decode ÷ memcpy", "", decode / memcpy)
    if "decode, given" in entrant.works:
        yield Row(case.name, name, "decode, given", "GB/s", _giga(entrant.rate("decode, given")))


def _ours(case: Case, raw: Bytes, dtype: DType) -> tuple[Entrant, float]:
    """modelpress, and the CPU seconds of its whole stage."""
    config = CompressConfig(min_decode_bytes_per_second=0)
    _compiled(dtype, config)
    started = time.process_time()
    piece = _piece(case, config)
    stage = time.process_time() - started
    codec, given = CODECS[piece.codec], np.zeros_like(raw)
    if not np.array_equal(decode_piece(piece, case.name, out=given), raw):
        raise RuntimeError(f"{case.name}: modelpress decodes to other bytes")
    works = {
        "encode": lambda: cpu_seconds(lambda: codec.encode(raw, piece.dtype, config)),
        "decode": lambda: cpu_seconds(lambda: decode_piece(piece, case.name)),
        "decode, given": lambda: cpu_seconds(lambda: decode_piece(piece, case.name, out=given)),
    }
    return Entrant("modelpress", raw.size, piece.stored_bytes, works), stage


def _piece(case: Case, config: CompressConfig) -> Piece:
    coded, _ = compress(Checkpoint("torch", {"weights": case.tensor}), config)
    return coded.tensors[0].piece


def _compiled(dtype: DType, config: CompressConfig) -> None:
    """Have numba load or compile all loops for this width before anything is timed."""
    few = np.zeros(64 * dtype.itemsize, np.uint8)
    few[:: 8 * dtype.itemsize] = 1
    for codec in CODECS.values():
        streams = codec.encode(few, dtype, config)
        codec.decode_into(streams, dtype, 64, config.chunk_symbols, np.empty_like(few))


def _copying(raw: Bytes) -> Entrant:
    copy = raw.copy()
    return Entrant("memcpy", raw.size, raw.size, {"decode": lambda: cpu_seconds(lambda: np.copyto(copy, raw))})


def thread_rows(case: Case, rounds: int) -> Iterator[Row]:
    """Wall time of decoding and of a copy by several threads: the array, and four of it (starting threads costs less).

    The copy says what the memory gives: where two threads copy no faster than one, it is nearly used up by one.
    """
    for label, times in (("", 1), (", four times", 4)):
        tensor = case.tensor.repeat(times)
        coded, _ = compress(Checkpoint("torch", {case.name: tensor}), CompressConfig(min_decode_bytes_per_second=0))
        piece, raw = coded.tensors[0].piece, to_bytes(tensor)
        given = np.zeros_like(raw)
        best: dict[tuple[str, int], float] = {}
        with ThreadPoolExecutor(max(THREADS)) as pool:
            for _ in range(4 * rounds):
                for threads in THREADS:
                    started = time.perf_counter()
                    decode_piece(piece, case.name, out=given, threads=threads)
                    _least(best, ("modelpress", threads), time.perf_counter() - started)
                    parts = zip(np.array_split(given, threads), np.array_split(raw, threads), strict=True)
                    started = time.perf_counter()
                    list(pool.map(lambda part: np.copyto(*part), parts))
                    _least(best, ("memcpy", threads), time.perf_counter() - started)
        title = f"threads: {case.name}{label}, {raw.size / 1e6:.0f} MB, wall time, {usable_cores()} cores"
        for (what, threads), seconds in sorted(best.items(), reverse=True):
            system = f"{what}, {threads} thread" + ("s" if threads > 1 else "")
            yield Row(title, system, "rate", "GB/s", raw.size / seconds / 1e9)
            yield Row(title, system, "speed-up", "", best[what, THREADS[0]] / seconds)


def _least(best: dict[tuple[str, int], float], key: tuple[str, int], seconds: float) -> None:
    best[key] = min(best.get(key, seconds), seconds)


def cold_rows(starts: int) -> Iterator[Row]:
    """Wall seconds of a fresh process until its first tensor is decoded, without and with numba's cache."""
    tensor = torch.randn(COLD_SYMBOLS, generator=torch.Generator().manual_seed(0)).bfloat16()
    coded, _ = compress(Checkpoint("torch", {"weights": tensor}), CompressConfig(codecs=["planes-huffman"]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "coded"
        path.write_bytes(coded.to_bytes())
        empty = [_cold_start(path, Path(folder) / str(start)) for start in range(min(starts, 2))]
        warm = [_cold_start(path, Path(folder) / "0") for _ in range(starts)]
    title = "cold start: seconds in a fresh process"
    for system, runs in (("modelpress, empty cache", empty), ("modelpress, warm cache", warm)):
        package, kernels, first = (min(times) for times in zip(*runs, strict=True))
        yield Row(title, system, "import modelpress", "s", package)
        yield Row(title, system, "import of the kernels", "s", kernels)
        yield Row(title, system, f"first decode, {COLD_SYMBOLS / 1e6:g}M bf16", "s", first)


def _cold_start(path: Path, cache: Path) -> tuple[float, ...]:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", COLD, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"a cold start failed:\n{done.stderr[-2000:]}")
    return tuple(float(seconds) for seconds in done.stdout.split())


def _giga(rate: float | None) -> float | None:
    return None if rate is None else rate / 1e9


def run(argv: Sequence[str]) -> None:
    """The command line; with `--write`, the figure too."""
    rows: list[Row] = []

    def kept(quick: bool) -> Iterator[Row]:
        for row in measure(quick):
            rows.append(row)
            yield row

    main("codecs", kept, argv, note=NOTE)
    if "--write" in argv:
        draw(rows, FIGURE)
        print(f"wrote {FIGURE}", file=sys.stderr)


if __name__ == "__main__":
    run(sys.argv[1:])
