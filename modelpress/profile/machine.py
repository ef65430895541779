"""The machine and its ceilings, measured: copy bandwidth, rates of matrix products, and what a call costs.

Each ceiling is the best of repeated runs, as other work on the machine only ever makes a run slower. Bandwidth counts
bytes as STREAM's Copy does, each read and each written byte once (McCalpin 1995); the caches' own traffic is not in it.
"""

from __future__ import annotations

import functools
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime
import psutil
import torch
from onnx import GraphProto, helper

from modelpress import graph, memory, providers
from modelpress.cores import usable_cores
from modelpress.profile import graphs
from modelpress.profile.kinds import device_kinds
from modelpress.reports.measured import Figure, Measured, NotMeasured, value_of
from modelpress.reports.profile import MachineProfile, MatrixRate

Runtime = Literal["onnxruntime", "torch"]
COPY_BYTES = 128 * 2**20
"""Of one array: some times the largest caches."""
MATRIX_SIZE = 1024
"""Rows and columns of each factor: large enough for a kernel's best rate, small enough to be run many times."""
SMALL_MATRIX = 128
"""The first that are tried. They are doubled, types other than float32 as long as a product is expected to take less
than `_MOST_SECONDS`."""
_MOST_SECONDS = 0.25
CHAIN = 256
"""Calls of torch between two looks at the clock."""
CALLS = 200
"""Runs of a graph by which the cost of a call in ONNX Runtime is measured."""
LEAST_RUNS = 5
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def measure(runtime: Runtime, provider: str, threads: int, seconds: float) -> MachineProfile:
    """The machine, and its ceilings where a model runs on it.

    Args:
        runtime: whose calls are timed.
        provider: ONNX Runtime execution provider; with a GPU's, ceilings are those of torch's GPU.
        threads: of one operator; 0 takes the cores that this process may use.
        seconds: time for each ceiling.
    """
    threads = threads or usable_cores()
    on_gpu = providers.on_gpu(provider) and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    elsewhere = None if provider == "CPUExecutionProvider" or on_gpu else _no_torch_gpu(provider)
    with torch_threads(threads), torch.inference_mode():
        return MachineProfile(
            cpu=processor(),
            cores=usable_cores(),
            memory_bytes=usable_memory(),
            device="cuda" if on_gpu else "cpu",
            gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            gpu_memory_bytes=_gpu_memory(),
            threads=threads,
            copy_bytes_per_second=elsewhere or copy_bandwidth(device, seconds),
            matrix_rates=[
                *(
                    MatrixRate(dtype=name, flops_per_second=elsewhere or _rate(dtype, device, threads, seconds))
                    for name, dtype in DTYPES.items()
                ),
                MatrixRate(dtype="int8", flops_per_second=_int8(elsewhere, on_gpu, threads, seconds)),
            ],
            call_seconds=_call(runtime, provider, seconds),
            kinds=device_kinds(),
        )


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch's operators use so many threads while this is open; 0 takes the cores that this process may use."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or usable_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _no_torch_gpu(provider: str) -> NotMeasured:
    return NotMeasured(not_measured=f"{provider} computes on a device that this build of torch cannot use")


def best(run: Callable[[], object], seconds: float) -> float:
    """Least time of a call among those that fit in so many seconds, after one to warm up."""
    run()
    least, calls, start = float("inf"), 0, time.perf_counter()
    while calls < LEAST_RUNS or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        run()
        least, calls = min(least, time.perf_counter() - before), calls + 1
    return least


def copy_bandwidth(device: torch.device, seconds: float) -> Figure:
    """Bytes read and written per second by a copy of `COPY_BYTES`: on torch's threads or, on the CPU, on one by numpy,
    whichever is faster."""
    try:
        source = torch.zeros(COPY_BYTES // 4, dtype=torch.float32, device=device).fill_(1.0)
        target = torch.zeros_like(source)
    except (RuntimeError, MemoryError) as error:
        if not memory.ran_out(error):
            raise
        return NotMeasured(not_measured=f"no memory for two arrays of {COPY_BYTES} bytes")
    what = f"copy of {COPY_BYTES // 2**20} MiB on {device.type}"
    by_torch = best(lambda: _finished(target.copy_(source)), seconds)
    found = Measured(value=2 * COPY_BYTES / by_torch, by=f"torch {what}")
    if device.type != "cpu":
        return found
    by_numpy = best(lambda: np.copyto(target.numpy(), source.numpy()), seconds)
    return faster(found, Measured(value=2 * COPY_BYTES / by_numpy, by=f"numpy {what}"))


def faster(first: Figure, second: Figure) -> Figure:
    """The higher of two ceilings; one that was measured, if only one was."""
    return max(first, second, key=lambda figure: value_of(figure) or 0.0)


def matrix_rate(dtype: torch.dtype, device: torch.device, seconds: float) -> Figure:
    """Operations per second of a product of two square matrices by torch.

    A type that the processor has no instructions for may be a thousand times slower: its matrices are smaller.
    """

    def product(size: int) -> float:
        first = torch.rand(size, size, device=device).to(dtype)
        return best(lambda: _finished(first @ first), seconds / 4)

    size, rates = SMALL_MATRIX, dict[int, float]()
    try:
        while size <= MATRIX_SIZE:
            taken = product(size)
            rates[size] = 2 * size**3 / taken
            if dtype != torch.float32 and taken * 2**3 > _MOST_SECONDS:
                break
            size *= 2
    except RuntimeError as error:  # torch says so of a type that a device has no kernel for
        return NotMeasured(not_measured=f"torch multiplies no {dtype} matrices on {device.type}: {str(error)[:200]}")
    size, rate = max(rates.items(), key=lambda pair: pair[1])
    return Measured(value=rate, by=f"torch product of {size}² on {device.type}")


def _rate(dtype: torch.dtype, device: torch.device, threads: int, seconds: float) -> Figure:
    """By torch; float32 on the CPU by torch or ONNX Runtime, whichever is faster."""
    found = matrix_rate(dtype, device, seconds)
    if dtype == torch.float32 and device.type == "cpu":
        return faster(found, float_rate(threads, seconds))
    return found


def _int8(elsewhere: NotMeasured | None, on_gpu: bool, threads: int, seconds: float) -> Figure:
    if elsewhere is not None:
        return elsewhere
    if on_gpu:
        return NotMeasured(not_measured="ONNX Runtime multiplies 8-bit integers on the CPU alone")
    return int8_rate(threads, seconds)


def int8_rate(threads: int, seconds: float) -> Figure:
    """The same of 8-bit integers (unsigned times signed, to 32 bits), by ONNX Runtime's MatMulInteger on the CPU."""
    return _runtime_rate("MatMulInteger", (np.uint8, np.int8, np.int32), threads, seconds)


def float_rate(threads: int, seconds: float) -> Figure:
    """The same of float32, by ONNX Runtime's MatMul on the CPU."""
    return _runtime_rate("MatMul", (np.float32, np.float32, np.float32), threads, seconds)


def _runtime_rate(operator: str, dtypes: tuple[type, type, type], threads: int, seconds: float) -> Figure:
    """Operations per second of an operator on two square matrices, the second of them constant, as weights are."""
    size, types = MATRIX_SIZE, [helper.np_dtype_to_tensor_dtype(np.dtype(dtype)) for dtype in dtypes]
    generator = np.random.default_rng(0)
    first: np.ndarray = generator.integers(1, 100, (size, size)).astype(dtypes[0])
    weight: np.ndarray = generator.integers(1, 100, (size, size)).astype(dtypes[1])
    ends = [helper.make_tensor_value_info(name, types[place], [size, size]) for name, place in (("x", 0), ("y", 2))]
    constant = helper.make_tensor("w", types[1], [size, size], weight.tobytes(), raw=True)
    node = helper.make_node(operator, ["x", "w"], ["y"])
    session = _session(helper.make_graph([node], "g", ends[:1], ends[1:], [constant]), threads, "CPUExecutionProvider")
    taken = best(lambda: session.run(None, {"x": first}), seconds)
    return Measured(value=2 * size**3 / taken, by=f"ONNX Runtime's {operator} of {size}² on cpu")


def _call(runtime: Runtime, provider: str, seconds: float) -> Figure:
    """Seconds of an operator on one number."""
    if runtime == "torch":
        value = torch.zeros(1)

        def chain() -> None:
            for _ in range(CHAIN):
                torch.sin(value)

        return Measured(value=best(chain, seconds) / CHAIN, by="torch's sin of one number")
    if provider != "CPUExecutionProvider":
        return NotMeasured(not_measured=f"calls on {provider} overlap, so that one alone has no cost of its own")
    return Measured(value=graphs.call_seconds(CALLS), by="ONNX Runtime's Sin of one number")


def _session(body: GraphProto, threads: int, provider: str) -> onnxruntime.InferenceSession:
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return graph.session(graph.split(model), provider, threads)


def _finished(tensor: torch.Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize()


@functools.cache
def processor() -> str:
    """Model of the processor; what Python knows of it where the kernel does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def usable_memory() -> int:
    """Bytes of main memory that this process may use: the machine's, or its control group's limit if that is less."""
    limits = [psutil.virtual_memory().total]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min(limits)


def _gpu_memory() -> Figure:
    if not torch.cuda.is_available():
        return NotMeasured(not_measured="torch finds no GPU")
    return Measured(value=torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
