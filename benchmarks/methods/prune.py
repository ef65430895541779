"""Pruning: what zeros cost a sentence encoder before and after recovery, and what they bring in speed.

The peers are the published algorithms, which the library implements: magnitude, Wanda and SparseGPT, each with the same
calibration data. `nvidia-modelopt` has SparseGPT and magnitude at 2:4; its rows are measured
where it is installed (`pip install nvidia-modelopt`).
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks._encoder import encoder_config
from benchmarks._report import Row, main
from modelpress import graph
from modelpress.checkpoint import Checkpoint
from modelpress.config import ExportConfig, PruneConfig, TrainConfig, WorkloadConfig
from modelpress.cores import usable_cores
from modelpress.evaluate import measure_latency
from modelpress.export import export
from modelpress.progress import silent
from modelpress.prune import PRUNERS, prune_
from modelpress.prune.recovery import recover_
from modelpress.residence import IN_MEMORY
from modelpress.workload import Batch, Split, Workload
from modelpress.workloads.image_classification import ImageClassification
from modelpress.workloads.sentence_embedding import SentenceEmbedding

NOTE = """\
The encoder (22.7M parameters, of which the 10.6M in linear layers are pruned by half): mean cosine of its embeddings to
the unpruned model's, and mrr, on texts that no other part sees. All methods have the same calibration data. Recovery
trains on texts of the training split; it costs minutes, and only SparseGPT's model has it here. Seconds are the wall
time of the pruning alone and of the recovery alone.

The CNN (0.70M parameters): half of the weights as zeros; of its channels, see `benchmarks.methods.structured`.

Throughput: ONNX Runtime, fp32, all cores; the best of several rounds in which the models take turns.
"""

METHODS: tuple[Literal["magnitude", "wanda", "sparsegpt"], ...] = ("magnitude", "wanda", "sparsegpt")
PATTERNS: dict[Literal["unstructured", "2:4"], str] = {"unstructured": "encoder, 50 % zeros", "2:4": "encoder, 2:4"}
BATCH = 32
ROUNDS = 3


class Texts(SentenceEmbedding):
    """Training batches of texts of like length, each on its own: recovery needs no pairs, and padding costs time."""

    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        """As the base's, but of the training split with a seed: the order of the batches is shuffled, not the texts."""
        if split != "train" or seed is None:
            yield from super().batches(split, batch_size, seed)
            return
        texts = sorted(self._texts(split), key=len)
        starts = torch.arange(0, len(texts), batch_size)
        for start in starts[torch.randperm(len(starts), generator=torch.Generator().manual_seed(seed))].tolist():
            yield Batch(self.tokenize(texts[start : start + batch_size]))


def measure(quick: bool) -> Iterable[Row]:
    """Rows of the encoder by pattern and method, of the CNN, and of both models' throughput."""
    encoder = Texts(
        encoder_config(calibration=24 if quick else 200, evaluation=48 if quick else 200, train=24 if quick else 4000)
    )
    dense = encoder.source()
    models = {"unpruned": dense}
    for pattern, case in PATTERNS.items():
        target = outputs(dense, encoder)
        yield from quality(case, "unpruned", " before recovery", dense, encoder, target)
        for method in METHODS:
            module = copy.deepcopy(dense)
            recovery = TrainConfig(epochs=1 if quick else 6, batch_size=16, learning_rate=5e-4)
            config = PruneConfig(method=method, pattern=pattern, recovery=recovery if method == "sparsegpt" else None)
            yield from _encoder(case, module, dense, encoder, target, config)
            models[f"{method}, {case.partition(', ')[2]}"] = module
        if pattern == "2:4":
            for method in ("magnitude", "sparsegpt"):
                yield from _modelopt(case, method, dense, encoder, target)
    timed = {name: module for name, module in models.items() if name.startswith(("unpruned", "sparsegpt"))}
    yield from throughput("encoder, throughput", timed, encoder, quick)
    yield from _cnn(quick)


def _encoder(
    case: str, module: nn.Module, dense: nn.Module, workload: Texts, target: Tensor, config: PruneConfig
) -> Iterator[Row]:
    """Prune in place and measure; recover and measure."""
    system = f"modelpress {config.method}"
    started = time.perf_counter()
    outcome = PRUNERS[config.method](module, workload, config, silent, {}, IN_MEMORY)
    yield Row(case, system, "pruning", "s", time.perf_counter() - started)
    yield from quality(case, system, " before recovery", module, workload, target)
    if config.recovery is not None:
        started = time.perf_counter()
        recover_(module, dense, workload, config.recovery, config.recovery_hidden_weight, outcome.hold, silent)
        yield Row(case, system, "recovery", "s", time.perf_counter() - started)
        yield from quality(case, system, " after recovery", module, workload, target)
    weights = [torch.as_tensor(module.get_submodule(name).weight) for name in outcome.masks]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    yield Row(case, system, "share of zeros", "", zeros / outcome.eligible_parameters)


def quality(case: str, system: str, when: str, module: nn.Module, workload: Workload, target: Tensor) -> Iterator[Row]:
    """Mean cosine of an encoder's embeddings to `target`, and its mrr; `when` follows both metrics' names."""
    found = outputs(module, workload)
    cosine = nn.functional.cosine_similarity(found, target).mean()
    yield Row(case, system, f"cosine{when}", "", float(cosine))
    yield Row(case, system, f"mrr{when}", "", float(workload.score(found.numpy()).mean()))


def _modelopt(case: str, method: str, dense: nn.Module, workload: SentenceEmbedding, target: Tensor) -> Iterator[Row]:
    """NVIDIA's ModelOpt, on the same calibration data; it has no other pattern, and no recovery of its own."""
    system = f"nvidia-modelopt {method}"
    if importlib.util.find_spec("modelopt") is None:
        yield Row(case, system, "cosine before recovery", "", None)
        return
    sparsity = importlib.import_module("modelopt.torch.sparsity")
    batches = list(workload.batches("calibration", BATCH))

    def forward_loop(model: nn.Module) -> None:
        for batch in batches:
            model(**batch.inputs)

    started = time.perf_counter()
    mode = {"magnitude": "sparse_magnitude", "sparsegpt": "sparsegpt"}[method]
    module = sparsity.sparsify(copy.deepcopy(dense), mode, config={"forward_loop": forward_loop})
    yield Row(case, system, "pruning", "s", time.perf_counter() - started)
    yield from quality(case, system, " before recovery", module.eval(), workload, target)


def _cnn(quick: bool) -> Iterator[Row]:
    workload = ImageClassification(
        WorkloadConfig(kind="image-classification", model="digits-cnn", data="digits", train_epochs=3 if quick else 30)
    )
    dense = workload.source()
    configs = {
        "modelpress magnitude, 50 % zeros": PruneConfig(method="magnitude"),
        # The first convolution reads 9 values, which 4 does not divide.
        "modelpress magnitude, 2:4": PruneConfig(method="magnitude", pattern="2:4", ignore=["features.0"]),
    }
    models = {"unpruned": dense}
    for name, config in configs.items():
        models[name] = copy.deepcopy(dense)
        prune_(models[name], workload, config)
    case = "digits CNN"
    for name, module in models.items():
        accuracy = workload.score(outputs(module, workload).numpy()).mean()
        parameters = sum(parameter.numel() for parameter in module.parameters())
        yield Row(case, name, "parameters", "", float(parameters))
        yield Row(case, name, "accuracy", "", float(accuracy))
    yield from throughput(case, models, workload, quick)


def outputs(module: nn.Module, workload: Workload) -> Tensor:
    """Outputs on the evaluation split, (samples, …) float32."""
    with torch.inference_mode():
        return torch.cat([module(**batch.inputs) for batch in workload.batches("evaluation", BATCH)])


def throughput(case: str, models: Mapping[str, nn.Module], workload: Workload, quick: bool) -> Iterator[Row]:
    """Samples per second in ONNX Runtime, fp32, all cores, and beside those of the model named `unpruned`."""
    sessions = {name: _session(export(module, workload, ExportConfig())[0]) for name, module in models.items()}
    for size in (1, BATCH):
        inputs = workload.example(size)
        best = dict.fromkeys(sessions, 0.0)
        for _ in range(ROUNDS):
            for name, session in sessions.items():
                run = functools.partial(graph.run, session)
                found = measure_latency(run, inputs, size, 0.1 if quick else 1.0)
                best[name] = max(best[name], found.throughput_per_second)
        for name, rate in best.items():
            yield Row(case, name, f"throughput at batch {size}", "/s", rate)
            yield Row(case, name, f"of the unpruned at batch {size}", "×", rate / best["unpruned"])


def _session(checkpoint: Checkpoint) -> graph.Session:
    return graph.session(checkpoint, threads=usable_cores())


if __name__ == "__main__":
    main("methods.prune", measure, note=NOTE)
