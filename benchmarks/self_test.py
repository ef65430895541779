"""How far answers lie apart that should be the same, and what the self-test takes: `python -m benchmarks.self_test`.

Golden answers are made as a publication makes them: CPU, one thread. Then the same graph answers the same samples in
sessions that differ in what may differ from machine to machine: threads, the level of ONNX Runtime's own rewriting (it
stands for other versions and kernels), and int8 kernels that can't saturate (which processors without VNNI use).
`difference` is the largest, as a share of the largest answer, as `golden.check` has it; it must stay far below
`tolerance`, and that below what a fault does. The faults, each in the largest matrix: 5 % too large, the least bits
lost, the first two rows swapped, the sign of the largest weight turned. All of it with noise as inputs, which is the
default, and with samples of the calibration data.

`self-test` is the time of asking and comparing, after the session was made; `load` all of a load from a local store.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from benchmarks._encoder import encoder_config
from benchmarks._report import Row, main
from modelpress import golden, golden_inputs, graph
from modelpress.checkpoint import Checkpoint
from modelpress.compress import compress
from modelpress.config import CompressConfig, ExportConfig, QuantizeConfig, ShardConfig, WorkloadConfig
from modelpress.export import export
from modelpress.golden import Golden
from modelpress.publish import publish
from modelpress.quantize import quantize
from modelpress.shard import draft_manifest, write_shards
from modelpress.store import open_store
from modelpress.workload import Workload, load_workload
from serving.engine import load_engine

SAMPLES = 4
LEVELS = {
    "no rewriting": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic rewriting": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended rewriting": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
}
Fault = Callable[[torch.Tensor], torch.Tensor]


def measure(quick: bool) -> Iterator[Row]:
    """Rows of the digits classifier and of the sentence encoder, in float and in int8."""
    digits = load_workload(WorkloadConfig(kind="image-classification", model="digits-cnn", data="digits"))
    module = digits.skeleton({}) if quick else digits.source()
    float_graph = export(module, digits, ExportConfig())[0]
    yield from _case("digits, float", float_graph, digits)
    yield from _case("digits, static int8", quantize(float_graph, digits, QuantizeConfig(method="static"))[0], digits)
    if quick:
        return
    texts = load_workload(encoder_config(calibration=64, evaluation=32))
    float_graph = export(texts.source(), texts, ExportConfig())[0]
    yield from _case("encoder, float", float_graph, texts)
    for method in ("dynamic", "static", "weight-only"):
        config = QuantizeConfig.model_validate({"method": method})
        yield from _case(f"encoder, {method}", quantize(float_graph, texts, config)[0], texts)


def _case(case: str, checkpoint: Checkpoint, workload: Workload) -> Iterator[Row]:
    real = {name: tensor.numpy() for name, tensor in workload.example(SAMPLES).items()}
    yield from _asked(f"{case}, calibration samples", checkpoint, workload, real)
    yield from _asked(case, checkpoint, workload, golden_inputs.of_workload(workload, SAMPLES))


def _asked(case: str, checkpoint: Checkpoint, workload: Workload, inputs: dict[str, np.ndarray]) -> Iterator[Row]:
    samples = golden.make(checkpoint, inputs, classes=workload.outputs == "logits")
    assert samples is not None
    yield Row(case, "the file", "size", "bytes", len(samples.to_bytes()))
    yield Row(case, "the file", "tolerance", "of the largest answer", samples.tolerance)
    for name, session in _sessions(checkpoint):
        yield Row(case, name, "difference", "of the largest answer", _difference(samples, session))
    for name, fault in _faults().items():
        broken = _broken(checkpoint, fault)
        if broken is not None:
            yield Row(case, name, "difference", "of the largest answer", _difference(samples, graph.session(broken)))
    yield from _times(case, checkpoint, samples)


def _sessions(checkpoint: Checkpoint) -> Iterator[tuple[str, onnxruntime.InferenceSession]]:
    for threads in (1, 2, 4):
        yield f"{threads} threads", graph.session(checkpoint, threads=threads)
    model = graph.join(checkpoint).SerializeToString()
    for name, level in LEVELS.items():
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        yield name, onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    yield "int8 that can't saturate", onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _difference(samples: Golden, session: onnxruntime.InferenceSession) -> float:
    """The largest, whatever the tolerance says; infinite where the answer is no number at all."""
    names = [one.name for one in session.get_outputs()]
    found = dict(zip(names, session.run(None, samples.inputs), strict=True))
    if not all(np.isfinite(answer).all() for answer in found.values()):
        return float("inf")
    worst = 0.0
    for name, answer in samples.answers.items():
        given = found[name].reshape(-1)[:: samples.strides[name]].astype(np.float64)
        worst = max(worst, float(np.abs(given - answer).max() / np.abs(answer).max()))
    return worst


def _faults() -> dict[str, Fault]:
    def scaled(weight: torch.Tensor) -> torch.Tensor:
        return (weight.to(torch.float32) * 1.05).to(weight.dtype)

    def coarse(weight: torch.Tensor) -> torch.Tensor:
        if weight.is_floating_point():
            return weight.to(torch.float16).mul(8).round().div(8).to(weight.dtype)
        return (weight.to(torch.int32) // 16 * 16).to(weight.dtype)

    def swapped(weight: torch.Tensor) -> torch.Tensor:
        other = weight.clone()
        other[[0, 1]] = weight[[1, 0]]
        return other

    def turned(weight: torch.Tensor) -> torch.Tensor:
        other = weight.clone().reshape(-1)
        place = other.to(torch.float32).abs().argmax()
        other[place] = -other[place]
        return other.reshape(weight.shape)

    return {
        "a matrix 5 % too large": scaled,
        "a matrix' least bits lost": coarse,
        "two rows swapped": swapped,
        "one sign turned": turned,
    }


def _broken(checkpoint: Checkpoint, fault: Fault) -> Checkpoint | None:
    """The checkpoint with a fault in the largest matrix that every row of an answer goes through."""
    matrices = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if tensor.ndim == 2 and min(tensor.shape) > 1 and "embed" not in name.lower()
    }
    if not matrices:
        return None
    name = max(matrices, key=lambda one: (matrices[one].numel(), one))
    return replace(checkpoint, tensors=checkpoint.tensors | {name: fault(matrices[name]).contiguous()})


def _times(case: str, checkpoint: Checkpoint, samples: Golden) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(f"{folder}/store")
        whole = replace(checkpoint, files=checkpoint.files | {golden.GOLDEN_FILE: samples.to_bytes()})
        coded, report = compress(whole, CompressConfig())
        Path(folder, "shards").mkdir()
        shards, _ = write_shards(coded, ShardConfig(), Path(folder, "shards"))
        manifest, blobs = draft_manifest("case", coded, shards)
        pack = publish(store, manifest, shards, blobs, source_bytes=report.raw_bytes).pack
        loads, tests = [], []
        for _ in range(5):
            started = time.perf_counter()
            engine = load_engine(store, "case", pack, "CPUExecutionProvider", 0)
            loads.append(time.perf_counter() - started)
            started = time.perf_counter()
            engine.self_test(golden.read(whole.files[golden.GOLDEN_FILE]))
            tests.append(time.perf_counter() - started)
    yield Row(case, "modelpress", "self-test", "ms", 1e3 * statistics.median(tests))
    yield Row(case, "modelpress", "load", "ms", 1e3 * statistics.median(loads))


if __name__ == "__main__":
    main("self_test", measure)
