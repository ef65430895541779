"""The decoder for devices: what the host reads and refuses, and `on_device.py` in processes of their own.

Triton reads TRITON_INTERPRET once, when it is imported, and the other tests of this process must not see it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpress.codec import Stream, decode, gpu
from modelpress.dtypes import DType
from modelpress.errors import CorruptionError, SetupError, UnsupportedFormatError
from tests.codec.on_device import BF16, I8, PLANES, SEGMENT, coded, weights, with_body

ROOT = Path(__file__).parents[2]


def readers(
    streams: list[Stream], dtype: DType, symbols: int, chunk_symbols: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The CPU's decoder, and the host's half of the device's."""
    return (
        lambda: decode(PLANES, streams, dtype, symbols, chunk_symbols, doing="test"),
        lambda: gpu.stage_planes(streams, dtype, symbols, chunk_symbols, doing="test"),
    )


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_the_heads_are_refused_exactly_where_the_cpu_refuses_them(data: st.DataObject) -> None:
    symbols, chunk_symbols = data.draw(st.sampled_from([(100, 40), (9000, 5000), (3 * SEGMENT, 1 << 17)]))
    raw = weights(BF16, symbols, data.draw(st.integers(0, 3))) * np.uint8(data.draw(st.booleans()))
    streams = coded(raw, BF16, chunk_symbols, data.draw(st.sampled_from([(), (1,)])))
    which = data.draw(st.integers(0, 1))
    body = bytearray(streams[which].body)
    for _ in range(data.draw(st.integers(0, 2))):
        begin = int(data.draw(st.sampled_from(streams[which].bounds[:-1].tolist())))
        body[min(begin + data.draw(st.integers(0, 60)), len(body) - 1)] = data.draw(st.integers(0, 255))
    whole, last = len(body), int(streams[which].bounds[-2])
    body = body[: data.draw(st.sampled_from([whole, whole, whole - 1, last, last + 5, last + 6, last + 40]))]
    streams[which] = with_body(streams[which], bytes(body))
    refused = []
    for read in readers(streams, BF16, symbols, chunk_symbols):
        try:
            read()
        except CorruptionError as error:
            refused.append(str(error))
    assert len(refused) in (0, 2), refused


def test_a_segment_that_is_longer_than_its_symbols_can_be_is_refused_by_both() -> None:
    """Though the lengths add up to the chunk."""
    raw = np.random.default_rng(0).integers(0, 200, 2 * SEGMENT).astype(np.uint8)
    streams = coded(raw, I8, 1 << 17)
    chunk = np.frombuffer(streams[0].body, np.uint8).copy()
    staged = gpu.stage_planes(streams, I8, raw.size, 1 << 17)
    first, second = staged.buffer[staged.places[2] :][:8].view(torch.int32).tolist()
    place = chunk.size - first - second - 4
    assert chunk[place : place + 4].view("<u2").tolist() == [first, second]
    chunk[place : place + 4].view("<u2")[:] = 5633, first + second - 5633
    broken = [with_body(streams[0], chunk.tobytes())]
    for read in readers(broken, I8, raw.size, 1 << 17):
        with pytest.raises(CorruptionError, match="add up"):
            read()


def test_bounds_beyond_the_body_are_refused() -> None:
    streams = coded(weights(BF16, 100), BF16, 40)
    for bounds in ([0, 20, 10, streams[0].size_bytes], [-9, *streams[0].bounds[1:]], [0, 40, 80, 10**9]):
        for which in (0, 1):
            broken = list(streams)
            broken[which] = replace(streams[which], bounds=np.array(bounds, np.int64))
            with pytest.raises(CorruptionError, match="chunk"):
                gpu.stage_planes(broken, BF16, 100, 40)


def test_one_table_is_staged_for_all_chunks_that_repeat_it() -> None:
    one, other = np.tile(weights(BF16, 512), 20), np.tile(weights(BF16, 512, 1) * 2, 5)
    raw = np.concatenate([one, other, one])
    streams = coded(raw, BF16, 512, (1,))
    staged = gpu.stage_planes(streams, BF16, raw.size // 2, 512)
    assert staged.places[1] == 4096 * 2


def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = coded(weights(I8, 100), I8, 64)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for device, found in (("cuda", "0 CUDA devices"), ("cuda:3", "0 CUDA devices"), ("meta", "a meta device")):
        with pytest.raises(SetupError, match=found) as raised:
            gpu.decode_to_device("planes-huffman", streams, I8, 100, 64, device)
        assert "modelpress.codec.decode" in str(raised.value)
    with pytest.raises(UnsupportedFormatError, match="'lzma'"):
        gpu.decode_to_device("lzma", streams, I8, 100, 64, "cpu")


IMPORTS = """
import sys
import modelpress.codec
assert not {"torch", "triton"} & set(sys.modules)
import numpy as np
import torch
from modelpress.codec import CODECS, gpu
from modelpress.config import CompressConfig
from modelpress.dtypes import DTYPES
from modelpress.errors import SetupError
assert "triton" not in sys.modules
assert not torch.cuda.is_initialized()
streams = CODECS["planes-huffman"].encode(np.zeros(64, np.uint8), DTYPES["I8"], CompressConfig(chunk_symbols=4096))

def decode():
    try:
        gpu.decode_to_device("planes-huffman", streams, DTYPES["I8"], 64, 4096, "cpu")
    except SetupError as error:
        print(error.found, error.fix, sep=", fix: ")

sys.modules["triton"] = None
decode()
del sys.modules["triton"]
decode()
"""


def run_python(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=clean, capture_output=True, text=True, check=False)


def test_triton_is_imported_by_the_first_decoding_and_missed_with_a_way_out() -> None:
    pytest.importorskip("triton", reason="triton is made for Linux only")
    done = run_python("-c", IMPORTS)
    assert done.returncode == 0, done.stderr
    missing, elsewhere = done.stdout.splitlines()
    assert missing.startswith("no triton, fix: pip install triton")
    assert elsewhere == f"a CPU, fix: {gpu.ON_CPU}"


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from modelpress.codec import gpu_kernels
decoder = ["*u32", "*u16", "*i64", "*i32", "*i32", "*u64", *["i32"] * 6]
cases = [(gpu_kernels.decode_segments, decoder, dict(SEGMENT=4096, MAX_BITS=11, LANES=64), 2)]
for planes in (1, 2, 4, 8):
    constants = dict(PLANES=planes, CODED=1, ROTATED=planes > 1, SEGMENT=4096, BLOCK=1024)
    cases.append((gpu_kernels.merge_planes, ["*u8", "*u8", f"*u{8 * planes}", "i64", *["i32"] * 5], constants, 4))
for kernel, types, constants, warps in cases:
    names = kernel.arg_names
    signature = dict(zip(names, [*types, *["constexpr"] * len(constants)], strict=True))
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    print(kernel.__name__, len(made.asm["cubin"]))
"""


def test_kernels_compile_for_a_device_that_is_not_here(tmp_path: Path) -> None:
    """By Triton's compiler, down to the device's code: its interpreter lets types pass that the compiler refuses."""
    pytest.importorskip("triton", reason="triton is made for Linux only")
    done = run_python("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^\w+ [1-9]\d+$", done.stdout, re.MULTILINE)) == 5


def run_on_device(**environment: str) -> None:
    tests = Path(__file__).with_name("on_device.py")
    done = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests), **environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    # On a CUDA device, those about the host's pages are skipped.
    assert re.search(r"^\d\d passed(, 3 skipped)? in", done.stdout, re.MULTILINE), done.stdout[-1000:]


def test_decodes_as_the_cpu_does_under_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is made for Linux only")
    run_on_device(TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_decodes_as_the_cpu_does_on_a_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    run_on_device()
