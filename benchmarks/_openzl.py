"""OpenZL in a process of its own, since a crash of its binding would take the benchmark along.

`python -m benchmarks._openzl GRAPH DTYPE PATH` codes the file at PATH once, compares what it decodes, and prints the
coded bytes; then, for each line `encode` or `decode` of its input, it does so and prints the CPU seconds. What fails is
printed.
"""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from benchmarks._peer import PeerError
from modelpress.dtypes import DTYPES

GRAPHS = ("Huffman", "FSE", "auto")
"""Entropy coding of byte planes by one of two coders; OpenZL's own choice for an array of numbers."""
FORMAT_VERSION = 21


class Worker:
    """The process, from the parent's side; leave its `with` block to end it."""

    def __init__(self, graph: str, dtype: str, path: Path) -> None:
        command = [sys.executable, "-m", "benchmarks._openzl", graph, dtype, str(path)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def stored_bytes(self) -> int:
        """Bytes of what it coded.

        Raises:
            PeerError: it crashed or refused, and how.
        """
        return int(self._answer())

    def seconds(self, work: str) -> float:
        """CPU seconds of one more `encode` or `decode`.

        Raises:
            PeerError: it crashed or refused, and how.
        """
        assert self._process.stdin is not None
        try:
            print(work, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._ended() from None
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise self._ended()
        if line.startswith("failed: "):
            raise PeerError(line)
        return line

    def _ended(self) -> PeerError:
        code = self._process.wait()
        return PeerError(f"crashed: {signal.Signals(-code).name}" if code < 0 else f"failed: exit status {code}")


def _graph(zl: Any, compressor: Any, name: str, dtype: str) -> Any:
    if name == "auto":
        return zl.graphs.Compress()(compressor)
    coder = {"Huffman": zl.graphs.Huffman, "FSE": zl.graphs.Fse}[name]()
    if dtype == "BF16":
        node = zl.nodes.BFloat16Deconstruct()
        return node(compressor, sign_frac=coder(compressor), exponent=coder(compressor))
    if DTYPES[dtype].itemsize == 1:
        return coder(compressor)
    # Byte planes: nearly as small as what Float32Deconstruct gives, and decoded more than twice as fast.
    planes = zl.nodes.TransposeSplit()(compressor, coder(compressor))
    return zl.nodes.ConvertNumToStructLE()(compressor, planes)


def _serve(name: str, dtype: str, path: str) -> None:
    zl = importlib.import_module("openzl.ext")
    data = np.fromfile(path, f"<u{DTYPES[dtype].itemsize}")
    kind = zl.Type.Serial if data.itemsize == 1 and name != "auto" else zl.Type.Numeric
    compressor = zl.Compressor()
    compressor.set_parameter(zl.CParam.FormatVersion, FORMAT_VERSION)
    compressor.select_starting_graph(_graph(zl, compressor, name, dtype))

    def encode() -> bytes:
        context = zl.CCtx()
        context.ref_compressor(compressor)
        return bytes(context.compress([zl.Input(kind, data)]))

    def decode() -> Any:
        return zl.DCtx().decompress(coded)

    coded = encode()
    if not np.array_equal(decode()[0].content.as_nparray().view(np.uint8), data.view(np.uint8)):
        raise RuntimeError("decodes to other bytes")
    print(len(coded), flush=True)
    for line in sys.stdin:
        work = {"encode": encode, "decode": decode}[line.strip()]
        started = time.process_time()
        work()
        print(time.process_time() - started, flush=True)


if __name__ == "__main__":
    try:
        _serve(*sys.argv[1:])
    except RuntimeError as error:  # what the binding raises for every error of the library
        print(f"failed: {str(error).splitlines()[0]}", flush=True)
