"""What a profile costs and whether its ceilings are the machine's: `python -m benchmarks.profile [--quick]`.

**Overhead.** Runs of a model with and without being watched take turns in one process; `slower when watched` is the
ratio of their medians, less 1. `added to all runs` is that times the share of runs that are watched, which is chosen so
that it stays at 5 % and below. Beside ours: torch.profiler on the same torch module, and cProfile, which knows Python
alone. `operators ÷ run` is the sum of the operators' times over the time of a run that is not watched. `share of the
line` is the time of the stage `profile` over that of the whole run of the line that it is a part of.

**Ceilings.** What a profile takes for the machine's limits, beside what other libraries reach on it: a copy by numpy
and by libc's `memcpy`, products by numpy's BLAS and by ONNX Runtime. A ceiling that a peer exceeds is none.
"""

from __future__ import annotations

import cProfile
import ctypes
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import nn

from benchmarks._encoder import encoder_config
from benchmarks._report import Row, main
from modelpress.config import ExportConfig, ProfileConfig, WorkloadConfig, load_config
from modelpress.cores import usable_cores
from modelpress.export import export
from modelpress.profile import graphs, machine, modules
from modelpress.profile.ran import Ran
from modelpress.profile.run import Subject, profile
from modelpress.reports.measured import Figure, value_of
from modelpress.workload import Workload, load_workload

ROOT = Path(__file__).parents[1]
CPU = "CPUExecutionProvider"


def measure(quick: bool) -> Iterator[Row]:
    """Rows of overhead by model and batch, of the stage within a line, and of ceilings."""
    yield from _ceilings(0.2 if quick else 2.0)
    seconds = 1.0 if quick else 10.0
    yield from _models("digits CNN", WorkloadConfig(**DIGITS), (1, 32), seconds)
    yield from _models(
        "all-MiniLM-L6-v2", encoder_config(calibration=32, evaluation=32), (1,) if quick else (1, 8), seconds
    )
    if not quick:
        yield from _line()


DIGITS = {"kind": "image-classification", "model": "digits-cnn", "data": "digits", "train_epochs": 1}


def _models(name: str, config: WorkloadConfig, batches: tuple[int, ...], seconds: float) -> Iterator[Row]:
    workload = load_workload(config)
    module = workload.source().eval()
    exported, _ = export(module, workload, ExportConfig())
    for batch in batches:
        case, inputs = f"{name}, batch {batch}", workload.example(batch)
        yield from _overhead(case, "modelpress", graphs.run_watched(exported, inputs, CPU, 0, seconds))
        with machine.torch_threads(0):
            yield from _overhead(case, "modelpress, torch module", modules.run_watched(module, inputs, seconds))
            yield from _peers(case, module, workload, batch, seconds)
    subject = Subject(name, exported, workload.example)
    start = time.perf_counter()
    profile(subject, ProfileConfig(seconds=seconds / 5))
    yield Row(f"{name}, whole profile", "modelpress", "time", "s", time.perf_counter() - start)


def _overhead(case: str, system: str, ran: Ran) -> Iterator[Row]:
    timed = [one.seconds for one in ran.operators if one.seconds is not None]
    yield Row(case, system, "a run", "ms", ran.run_seconds * 1e3)
    yield Row(case, system, "slower when watched", "%", (ran.watched_seconds / ran.run_seconds - 1) * 100)
    added = (ran.watched_seconds / ran.run_seconds - 1) * ran.watched_share
    yield Row(case, system, "added to all runs", "%", added * 100)
    yield Row(case, system, "operators ÷ run", "1", sum(timed) / ran.run_seconds)
    yield Row(case, system, "operators", "1", len(ran.operators))


def _peers(case: str, module: nn.Module, workload: Workload, batch: int, seconds: float) -> Iterator[Row]:
    inputs = workload.example(batch)

    def plain() -> None:
        module(**inputs)

    def by_torch() -> None:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True):
            module(**inputs)

    def by_python() -> None:
        cProfile.Profile().runcall(plain)

    with torch.inference_mode():
        for system, watched in (("torch.profiler", by_torch), ("cProfile", by_python)):
            free, seen = _in_turns(plain, watched, seconds)
            yield Row(case, system, "a run", "ms", free * 1e3)
            yield Row(case, system, "slower when watched", "%", (seen / free - 1) * 100)


def _in_turns(first: Callable[[], None], second: Callable[[], None], seconds: float) -> tuple[float, float]:
    """Medians of both."""
    times: tuple[list[float], list[float]] = ([], [])
    start = time.perf_counter()
    while len(times[0]) < 10 or time.perf_counter() - start < seconds:
        for run, found in zip((first, second), times, strict=True):
            before = time.perf_counter()
            run()
            found.append(time.perf_counter() - before)
    return statistics.median(times[0]), statistics.median(times[1])


def _line() -> Iterator[Row]:
    """A whole run of the line with the stage, in a store of its own."""
    import os

    with tempfile.TemporaryDirectory() as name:
        os.environ |= {"MODELPRESS_HOME": name, "PREFECT_HOME": f"{name}/prefect", "MODELPRESS_LOG": "text"}
        from flows.console import terminal

        with terminal():
            from flows.optimize import optimize

            recipe = load_config(ROOT / "configs" / "digits.yaml").model_copy(update={"profile": ProfileConfig()})
            start = time.perf_counter()
            result = optimize(recipe)
            whole = time.perf_counter() - start
    (stage,) = [row.seconds for row in result.stages if row.stage == "profile"]
    yield Row("digits.yaml, whole line", "modelpress", "line", "s", whole)
    yield Row("digits.yaml, whole line", "modelpress", "stage profile", "s", stage)
    yield Row("digits.yaml, whole line", "modelpress", "share of the line", "%", stage / whole * 100)


def _ceilings(seconds: float) -> Iterator[Row]:
    threads = usable_cores()
    found = machine.measure("onnxruntime", CPU, threads, seconds)
    yield Row("copy of 128 MiB", "modelpress", "bandwidth", "GB/s", _giga(found.copy_bytes_per_second))
    source = np.ones(machine.COPY_BYTES // 4, np.float32)
    target = np.zeros_like(source)
    for system, copy in (
        ("numpy, one thread", lambda: np.copyto(target, source)),
        ("memcpy, one thread", lambda: ctypes.memmove(target.ctypes.data, source.ctypes.data, source.nbytes)),
    ):
        yield Row("copy of 128 MiB", system, "bandwidth", "GB/s", 2 * source.nbytes / machine.best(copy, seconds) / 1e9)
    size = machine.MATRIX_SIZE
    case = f"product of {size} × {size}"
    for rate in found.matrix_rates:
        yield Row(case, "modelpress", rate.dtype, "Gop/s", _giga(rate.flops_per_second))
    matrix = np.random.default_rng(0).random((size, size), np.float32)
    yield Row(case, "numpy", "float32", "Gop/s", 2 * size**3 / machine.best(lambda: matrix @ matrix, seconds) / 1e9)
    session = _product(size, threads)
    taken = machine.best(lambda: session.run(None, {"x": matrix, "w": matrix}), seconds)
    yield Row(case, "ONNX Runtime", "float32", "Gop/s", 2 * size**3 / taken / 1e9)


def _giga(figure: Figure) -> float | None:
    value = value_of(figure)
    return None if value is None else value / 1e9


def _product(size: int, threads: int) -> onnxruntime.InferenceSession:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [size, size]) for name in ("x", "w", "y")]
    body = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ends[:2], ends[2:])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[CPU])


if __name__ == "__main__":
    main("profile", measure, note=__doc__.partition("\n\n")[2])
