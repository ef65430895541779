"""The pretrained sentence encoder quantized by every method, each with all of its layers in integers.

Agreement, retrieval and throughput are measured on held-out texts; the calibration texts are others. The peers are
ONNX Runtime's own quantizers and, where they are installed, torchao's.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from torch import Tensor

from benchmarks._encoder import encoder_config
from benchmarks._report import Row, main
from modelpress import compressed_tensors, graph, hf_writer
from modelpress.agreement import mean_cosine
from modelpress.checkpoint import Checkpoint
from modelpress.compress import compress
from modelpress.config import CompressConfig, ExportConfig, QuantizeConfig
from modelpress.export import export
from modelpress.progress import silent
from modelpress.quantize import static
from modelpress.quantize.build import builder
from modelpress.quantize.selection import chosen_layers, eligible_layers
from modelpress.workloads.sentence_embedding import SentenceEmbedding

NOTE = """\
An encoder of 22.7M parameters on docstrings. No layer stays in float and no budget is held: the methods themselves are
compared. Embedding tables stay in float everywhere. `cosine` is the mean over held-out texts between the embeddings and
the float graph's, `mrr` their retrieval; `speed` is throughput at the batch beside it ÷ that of the float graph in ONNX
Runtime, the median of rounds in which the two take turns; `coded bytes` is what modelpress.compress stores;
`time` is quantizing alone. `smooth` is SmoothQuant's α. Folders of compressed-tensors compute in torch with the values
that their codes stand for; their `bytes` are those of the safetensors files, as they are.
"""

BATCH = 32
ROUNDS = 11
CALLS = 2
ASKED = "asked"
TORCHAO = "torchao: int8 dynamic, compiled"

Inputs = dict[str, Tensor]
Runner = Callable[[Inputs], np.ndarray]

OURS: dict[str, dict[str, Any]] = {
    "dynamic int8, smooth 0": {"method": "dynamic", "smooth": 0},
    "dynamic int8": {"method": "dynamic"},
    "static int8 by minmax, smooth 0": {"method": "static", "calibration": "minmax", "smooth": 0},
    "static int8 by mse, smooth 0": {"method": "static", "smooth": 0},
    "static int8 by minmax": {"method": "static", "calibration": "minmax"},
    "static int8": {"method": "static"},
    "W8 g128, rtn": {"num_bits": 8, "algorithm": "rtn"},
    "W4 g128, rtn": {"algorithm": "rtn"},
    "W4 g128, gptq": {},
    "W4 g128 asymmetric, hqq": {"algorithm": "hqq", "symmetric": False},
    "W4 g128 asymmetric, gptq act-order": {"symmetric": False, "act_order": True},
    "W4 g32, rtn": {"algorithm": "rtn", "group_size": 32},
    "W4 g32 asymmetric, hqq": {"algorithm": "hqq", "symmetric": False, "group_size": 32},
    "W4 g32 asymmetric, gptq act-order": {"symmetric": False, "act_order": True, "group_size": 32},
}
QUICK = ("dynamic int8", "static int8", "W4 g128, rtn")
FOLDERS: dict[str, dict[str, Any]] = {
    "W4A16 g128, rtn": {"num_bits": 4, "algorithm": "rtn"},
    "W4A16 g128, gptq": {"num_bits": 4, "algorithm": "gptq"},
    "W8A16 g128, rtn": {"num_bits": 8, "algorithm": "rtn"},
    "fp8, a scale per channel": {"num_bits": 8, "algorithm": "fp8"},
}
"""Written as folders for vLLM; their agreement is that of what they compute in torch."""
QUICK_FOLDERS = ("W4A16 g128, rtn",)


@dataclass
class System:
    """Something that embeds texts."""

    name: str
    case: str
    run: Runner
    seconds: float | None = None
    """Time to quantize."""
    coded_bytes: int | None = None
    folder_bytes: int | None = None
    """Of a folder's safetensors files, as they are."""


def measure(quick: bool) -> Iterable[Row]:
    """Rows of each method and peer."""
    torch.manual_seed(0)
    workload = SentenceEmbedding(encoder_config(calibration=24 if quick else 128, evaluation=50 if quick else 300))
    source, _ = export(workload.source(), workload, ExportConfig())
    systems = [_system("onnxruntime fp32", "source", source, None)]
    systems += [_ours(name, source, workload) for name in OURS if not quick or name in QUICK]
    systems += list(_peers(source, workload, quick))
    folders = [_folder(name, workload) for name in FOLDERS if not quick or name in QUICK_FOLDERS]
    expected = _outputs(systems[0].run, workload)
    for system in [*systems, *folders]:
        found = _outputs(system.run, workload)
        yield Row(system.case, system.name, "cosine", "", mean_cosine(found, expected))
        yield Row(system.case, system.name, "mrr", "", float(workload.score(found).mean()))
        if system.folder_bytes is not None:
            yield Row(system.case, system.name, "bytes", "B", system.folder_bytes)
        yield Row(system.case, system.name, "coded bytes", "B", system.coded_bytes)
        yield Row(system.case, system.name, "time", "s", system.seconds)
    for batch_size in (BATCH, 1):
        speeds = _speeds(systems, workload.example(batch_size), 3 if quick else ROUNDS)
        for system in systems:
            yield Row(system.case, system.name, f"speed at batch {batch_size}", "×", speeds[system.name])
    if importlib.util.find_spec("torchao") is None:
        yield Row("int8", TORCHAO, "cosine", "", None)
    yield Row("int8", ASKED, "cosine", "", 0.995)
    yield Row("int8", ASKED, f"speed at batch {BATCH}", "×", 2.2)
    yield Row("weights in 4 and 8 bits", ASKED, "cosine", "", 0.96)


def _ours(name: str, source: Checkpoint, workload: SentenceEmbedding) -> System:
    options = OURS[name]
    config = QuantizeConfig(**options) if "method" in options else _weight_only(options)
    batches = _calibration(workload)
    started = time.perf_counter()
    model = graph.join(source)
    if config.method == "static":
        model = static.prepare(model)
    layers = chosen_layers(eligible_layers(model, embeddings=False), config)
    made = builder(model, layers, batches, config, silent)([layer.node for layer in layers], [])
    seconds = time.perf_counter() - started
    case = "weights in 4 and 8 bits" if config.method == "weight-only" else "int8"
    return _system(f"modelpress: {name}", case, graph.split(made), seconds)


def _folder(name: str, workload: SentenceEmbedding) -> System:
    """A compressed-tensors folder, written whole, and what lossless coding makes of its tensors."""
    config = QuantizeConfig(method="weight-only", max_quality_drop=0.2, **FOLDERS[name])
    started = time.perf_counter()
    rounded, _, _ = compressed_tensors.quantize(workload.source(), workload, config)
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory(prefix="modelpress-") as place:
        folder = Path(place, "folder")
        named = compressed_tensors.tensors(rounded, hf_writer.left_out(rounded.model, workload))
        hf_writer.write(named, {}, folder, hf_writer.SHARD_BYTES)
        size = sum(path.stat().st_size for path in folder.iterdir())
    coded = compress(Checkpoint("torch", named, {}, {}), CompressConfig())[1].stored_bytes

    def run(inputs: Inputs) -> np.ndarray:
        with torch.inference_mode():
            found: np.ndarray = rounded.module(**inputs).numpy()
        return found

    return System(f"modelpress: {name}", "compressed-tensors folders", run, seconds, coded, size)


def _weight_only(options: Mapping[str, Any]) -> QuantizeConfig:
    return QuantizeConfig(method="weight-only", **{"num_bits": 4, **options})


def _system(name: str, case: str, checkpoint: Checkpoint, seconds: float | None) -> System:
    session = graph.session(checkpoint)
    coded = compress(checkpoint, CompressConfig())[1].stored_bytes
    coded += sum(len(data) for data in checkpoint.files.values())
    return System(name, case, lambda inputs: graph.run(session, inputs), seconds, coded)


def _peers(source: Checkpoint, workload: SentenceEmbedding, quick: bool) -> Iterator[System]:
    with tempfile.TemporaryDirectory(prefix="modelpress-") as folder, _quiet():
        path = Path(folder, "model.onnx")
        onnx.save_model(graph.join(source), path)
        yield _onnxruntime_static(path, workload)
        if not quick:
            for bits, size, symmetric in ((4, 128, True), (4, 128, False), (4, 32, True), (8, 128, True)):
                yield _onnxruntime_nbits(path, bits, size, symmetric)
    yield from _torchao(workload)


class _Texts(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, batches: list[Inputs]) -> None:
        self._feeds = iter([{name: tensor.numpy() for name, tensor in batch.items()} for batch in batches])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def _onnxruntime_static(path: Path, workload: SentenceEmbedding) -> System:
    """ONNX Runtime's quantize_static with its defaults but for the operators: with all of them it is far worse."""
    started = time.perf_counter()
    quantize_static(
        str(path),
        str(path.with_name("static.onnx")),
        _Texts(_calibration(workload)),
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
    )
    seconds = time.perf_counter() - started
    return _system(
        "onnxruntime: quantize_static", "int8", graph.split(onnx.load(path.with_name("static.onnx"))), seconds
    )


def _onnxruntime_nbits(path: Path, bits: int, size: int, symmetric: bool) -> System:
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    started = time.perf_counter()
    config = DefaultWeightOnlyQuantConfig(block_size=size, is_symmetric=symmetric, bits=bits)
    quantizer = MatMulNBitsQuantizer(onnx.load(path), algo_config=config)
    quantizer.process()
    made: ModelProto = quantizer.model.model
    seconds = time.perf_counter() - started
    kind = "" if symmetric else " asymmetric"
    name = f"onnxruntime: MatMulNBitsQuantizer W{bits} g{size}{kind}"
    return _system(name, "weights in 4 and 8 bits", graph.split(made), seconds)


def _torchao(workload: SentenceEmbedding) -> Iterator[System]:
    """torchao's int8 with dynamic activations, compiled; its quality and its speed, in torch."""
    if importlib.util.find_spec("torchao") is None:
        return
    torchao = importlib.import_module("torchao.quantization")
    started = time.perf_counter()
    module = workload.source()
    torchao.quantize_(module, torchao.Int8DynamicActivationInt8WeightConfig())
    compiled = torch.compile(module, dynamic=True)
    with torch.inference_mode():
        compiled(**workload.example(BATCH))
    seconds = time.perf_counter() - started

    def run(inputs: Inputs) -> np.ndarray:
        with torch.inference_mode():
            found: np.ndarray = compiled(**inputs).numpy()
        return found

    yield System(TORCHAO, "int8", run, seconds)


def _calibration(workload: SentenceEmbedding) -> list[Inputs]:
    return [batch.inputs for batch in workload.batches("calibration", BATCH)]


def _outputs(run: Runner, workload: SentenceEmbedding) -> np.ndarray:
    return np.concatenate([run(batch.inputs) for batch in workload.batches("evaluation", BATCH)])


def _speeds(systems: list[System], inputs: Inputs, rounds: int) -> dict[str, float]:
    """Throughput ÷ the first system's: the median over rounds in which both took their turn, one after the other.

    A machine's slow stretches last longer than a round, and so fall on both.
    """
    first = systems[0].run
    return {
        system.name: statistics.median(_seconds(first, inputs) / _seconds(system.run, inputs) for _ in range(rounds))
        for system in systems
    }


def _seconds(run: Runner, inputs: Inputs) -> float:
    """The faster of two calls, after one that wakes this system's threads and lets the other's come to rest."""
    run(inputs)
    seconds = []
    for _ in range(CALLS):
        started = time.perf_counter()
        run(inputs)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


if __name__ == "__main__":
    main("methods.quantize", measure, note=NOTE)
