"""Decoding bf16 weights on a GPU: `python -m benchmarks.gpu_codecs [--quick] [--json PATH] [--write]`.

Everything in one go on a CUDA machine; without a device all rows say "not measured", with the reason. Peers are
measured where they are installed: `pip install nvidia-nvcomp-cu12 'dfloat11[cuda12]'`. Name the device with
`--hardware`, which otherwise is the processor. The goal: 600 GB/s of bf16 from bytes that lie on an H100.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import itertools
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np
import torch

from benchmarks._codec_cases import encoder_matrices
from benchmarks._report import Row, main
from modelpress.codec import CODECS, Bytes, gpu
from modelpress.config import CompressConfig
from modelpress.container.tensors import to_bytes
from modelpress.dtypes import DTYPES

BF16 = DTYPES["BF16"]
ELEMENTS, QUICK_ELEMENTS = 2**29, 2**25
MATRIX, QUICK_MATRIX = 2**24, 2**20
LANES = (32, 64, 128)
EXPONENTS = "exponents"
ROUNDS, QUICK_ROUNDS = 7, 3
MIN_SECONDS = 0.02
"""A round repeats its work for about so long: a launch alone takes some 10 microseconds of the host."""
RESIDENT, PINNED, WHOLE = "on the device", "from pinned memory", "from streams"
METRICS = {"modelpress": (RESIDENT, PINNED, WHOLE), "bf16 as it is": (PINNED,)}
NVCOMP = {"nvCOMP ANS, bytes": "|u1", "nvCOMP ANS, float16": "<f2", "nvCOMP ANS, exponents": EXPONENTS}
NOTE = """\
{machine}. All figures are GB of bf16 output per second. The weights are a pretrained encoder's matrices (22.7M), again
and again up to the size of the case. The best of several rounds, by the host's clock between two waits for the whole
device, launches included; every output is compared with the input. The goal is 600 on the device.

`on the device`: coded bytes and result lie there. `from pinned memory`: the coded bytes are copied first, and for
`bf16 as it is` the weights. `from streams`: all that `decode_to_device` does, with the check of the heads and the copy
to pinned memory. `copy` reads and writes the weights on the device. nvCOMP's ANS codes the bytes as they are, or as
float16; `exponents` codes the first plane alone, and its figure is that of whole weights, as though the rest were
free. DFloat11's encoder is written in Python, so it is measured on the single matrix only.
"""


def measure(quick: bool) -> Iterator[Row]:
    """Rows of both cases."""
    sizes = (QUICK_ELEMENTS, QUICK_MATRIX) if quick else (ELEMENTS, MATRIX)
    names = (f"bf16, {2 * sizes[0] / 1e9:.2g} GB", f"bf16, one matrix of {2 * sizes[1] / 1e6:.2g} MB")
    if reason := _missing():
        for name, system in itertools.product(names, ("modelpress", "copy", "bf16 as it is", *NVCOMP, "DFloat11")):
            for metric in METRICS.get(system, (RESIDENT,)):
                yield Row(name, f"{system} ({reason})", metric, "GB/s", None)
        return
    rounds = QUICK_ROUNDS if quick else ROUNDS
    encoder = torch.cat([matrix.reshape(-1) for matrix in encoder_matrices()]).bfloat16()
    for name, size in zip(names, sizes, strict=True):
        weights = encoder.repeat(-(-size // encoder.numel()))[:size]
        yield from case_rows(name, weights, torch.device("cuda"), rounds)
        for system, form in NVCOMP.items():
            yield from _peer_rows(name, system, partial(_nvcomp, weights, rounds, form))
        if size == sizes[1]:
            yield from _peer_rows(name, "DFloat11", partial(_dfloat11, weights, rounds))


def case_rows(case: str, weights: torch.Tensor, device: torch.device, rounds: int) -> Iterator[Row]:
    """One array by modelpress, and the copies that bound it."""
    raw, config = to_bytes(weights), CompressConfig()
    streams = CODECS["planes-huffman"].encode(raw, BF16, config)
    assert gpu.decodes_on_device("planes-huffman", streams)
    staged = gpu.stage_planes(streams, BF16, weights.numel(), config.chunk_symbols, pinned=device.type == "cuda")
    resident, out = staged.to(device), torch.empty(raw.size, dtype=torch.uint8, device=device)
    ratio = raw.size / sum(stream.size_bytes for stream in streams)
    rates = {n: _rate(partial(resident.decode, out, lanes=n), raw, out, rounds) for n in LANES}
    for lanes, rate in rates.items():
        yield Row(case, f"modelpress, {lanes} lanes", "ratio", "", ratio)
        yield Row(case, f"modelpress, {lanes} lanes", RESIDENT, "GB/s", rate)
    best = max(rates, key=rates.__getitem__)
    system, symbols = f"modelpress, {best} lanes", weights.numel()
    yield Row(case, system, PINNED, "GB/s", _rate(lambda: staged.to(device).decode(out, lanes=best), raw, out, rounds))
    whole = partial(gpu.decode_to_device, "planes-huffman", streams, BF16, symbols, config.chunk_symbols, device, out)
    yield Row(case, f"modelpress, {gpu.LANES} lanes", WHOLE, "GB/s", _rate(whole, raw, out, rounds))
    given = torch.from_numpy(raw)
    pinned = given.pin_memory() if device.type == "cuda" else given
    there = given.to(device)
    yield Row(case, "copy", RESIDENT, "GB/s", _rate(lambda: out.copy_(there), raw, out, rounds))
    yield Row(
        case, "bf16 as it is", PINNED, "GB/s", _rate(lambda: out.copy_(pinned, non_blocking=True), raw, out, rounds)
    )


def _peer_rows(case: str, system: str, peer: Callable[[], tuple[float, float]]) -> Iterator[Row]:
    """A peer's rows; where it is missing, or is not as it was when this was written, the reason."""
    ratio: float | None = None
    rate: float | None = None
    try:
        ratio, rate = peer()
    except ModuleNotFoundError as error:
        system = f"{system} (no module {error.name})"
    except (ArithmeticError, AttributeError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        system = f"{system} (failed: {type(error).__name__}: {str(error)[:80]})"
    yield Row(case, system, "ratio", "", ratio)
    yield Row(case, system, RESIDENT, "GB/s", rate)


def _nvcomp(weights: torch.Tensor, rounds: int, form: str) -> tuple[float, float]:
    """`form`: nvCOMP's name of the elements, or EXPONENTS."""
    nvcomp = importlib.import_module("nvidia.nvcomp")
    raw = to_bytes(weights)
    given = torch.from_numpy(raw)
    if form == EXPONENTS:
        given = ((weights.view(torch.int16) >> 7) & 255).to(torch.uint8)
    codec = nvcomp.Codec(algorithm="ANS", data_type="|u1" if form == EXPONENTS else form)
    coded = codec.encode(nvcomp.as_array(given.cuda()))
    decoded = torch.as_tensor(codec.decode(coded), device="cuda").view(torch.uint8)
    torch.cuda.synchronize()  # nvCOMP works on a stream of its own
    if not torch.equal(decoded.cpu(), given):
        raise ArithmeticError("it decodes to other bytes")
    # The second plane is as long as the first, and stays as it is.
    stored = coded.buffer_size + (given.numel() if form == EXPONENTS else 0)
    return raw.size / stored, raw.size / _seconds(lambda: codec.decode(coded), rounds, torch.device("cuda")) / 1e9


def _dfloat11(weights: torch.Tensor, rounds: int) -> tuple[float, float]:
    """Its kernel, launched as `dfloat11.compress_model` does for its check."""
    cupy, peer = importlib.import_module("cupy"), importlib.import_module("dfloat11.dfloat11")
    threads, per_thread = peer.threads_per_block[0], peer.bytes_per_thread
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        codec, _, table = peer.get_32bit_codec(peer.get_codec(weights)[1])
        luts = peer.get_luts(table)
        exponents, rest, positions, gaps, _ = peer.encode_weights([weights], codec, per_thread, threads)
    parts = [part.cuda() for part in (luts, exponents, rest, positions, gaps)]
    out = torch.empty(weights.numel(), dtype=torch.bfloat16, device="cuda")
    pointers = [part.data_ptr() for part in (*parts, out)]
    arguments = [*pointers, luts.shape[0], exponents.numel(), rest.numel()]
    most = int(np.diff(positions.view(torch.uint32).numpy().astype(np.int64)).max())
    grid = (math.ceil(exponents.numel() / (threads * per_thread)),)

    def decode() -> torch.Tensor:
        with cupy.cuda.Device(0):
            peer._decode(grid=grid, block=(threads,), shared_mem=threads * 4 + 4 + 2 * most, args=arguments)
        return out

    raw = to_bytes(weights)
    ratio = raw.size / sum(part.numel() * part.element_size() for part in parts)
    return ratio, _rate(decode, raw, out.view(torch.uint8), rounds)


def _rate(work: Callable[[], object], raw: Bytes, out: torch.Tensor, rounds: int) -> float:
    """GB of `raw` per second, once `work` is known to fill `out` with it.

    Raises:
        ArithmeticError: it does not.
    """
    out.fill_(0)
    work()
    if not np.array_equal(out.cpu().numpy(), raw):
        raise ArithmeticError("it decodes to other bytes")
    return raw.size / _seconds(work, rounds, out.device) / 1e9


def _seconds(work: Callable[[], object], rounds: int, device: torch.device) -> float:
    """Least seconds of one run, by rounds of as many as take `MIN_SECONDS`."""

    def timed(runs: int) -> float:
        _wait(device)
        started = time.perf_counter()
        for _ in range(runs):
            work()
        _wait(device)
        return (time.perf_counter() - started) / runs

    once = timed(1)
    runs = max(1, min(1000, round(MIN_SECONDS / max(once, 1e-6))))
    return min(timed(runs) for _ in range(rounds))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _missing() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None if importlib.util.find_spec("triton") else "no triton"


def machine() -> str:
    """The device, and the versions that matter here."""
    found = []
    for package in ("triton", "nvidia-nvcomp-cu12", "nvidia-nvcomp-cu13", "dfloat11"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{package} {metadata.version(package)}")
    device: Any = torch.cuda.get_device_name() if torch.cuda.is_available() else "No CUDA device"
    return ", ".join([device, *found])


if __name__ == "__main__":
    main("gpu_codecs", measure, note=NOTE.format(machine=machine()))
