"""Structured pruning: what channels, neurons, heads and layers cost that physically disappear, and what they bring.

The peers are published ways to say what a structure is worth, each with and without least-squares repair: the size of
its weights (Li et al. 2016, arXiv:1608.08710), the loss's gradient (Molchanov et al. 2019, arXiv:1906.10771), what it
changes in what reads it; of layers, the block influence of ShortGPT (arXiv:2403.03853), which without repair is that
method.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from torch import nn

from benchmarks._encoder import encoder_config
from benchmarks._report import Row, main
from benchmarks.methods.prune import Texts, outputs, quality, throughput
from modelpress.config import PruneConfig, TrainConfig, WorkloadConfig
from modelpress.distill import count_parameters
from modelpress.prune import prune_
from modelpress.workload import Workload
from modelpress.workloads.image_classification import ImageClassification

NOTE = """\
Nothing is trained but in the rows that say so: `repair` is a least-squares fit on calibration data. All ways have the
same calibration data and remove the same number of structures, so that their models are equally fast.

The CNN (0.70M parameters): accuracy with half of the channels and neurons. The encoder (22.7M parameters): mean cosine
of its embeddings to the unpruned model's, and mrr, on texts that no other part sees.

Throughput: ONNX Runtime, fp32, all cores; the best of several rounds in which the models take turns.
"""

Importance = Literal["magnitude", "activation", "taylor"]
Structure = Literal["channels", "neurons", "heads", "layers"]


class Cut(NamedTuple):
    """What is removed from the encoder."""

    name: str
    structure: Structure
    sparsity: float
    importances: tuple[Importance, ...]


CUTS = (
    Cut("half of the neurons", "neurons", 0.5, ("magnitude", "activation", "taylor")),
    Cut("half of the heads", "heads", 0.5, ("magnitude", "activation", "taylor")),
    Cut("1 of 6 layers", "layers", 1 / 6, ("activation", "taylor")),
    Cut("2 of 6 layers", "layers", 2 / 6, ("activation", "taylor")),
)
RECOVERED = "2 of 6 layers"


def measure(quick: bool) -> Iterable[Row]:
    """Rows of the CNN by importance, of the encoder by what is removed and importance, and of both one's throughput."""
    yield from _cnn(quick)
    yield from _encoder(quick)


def _cnn(quick: bool) -> Iterator[Row]:
    workload = ImageClassification(
        WorkloadConfig(kind="image-classification", model="digits-cnn", data="digits", train_epochs=3 if quick else 30)
    )
    dense = workload.source()
    case = "digits CNN, half of the channels and neurons"
    models = {"unpruned": dense}
    yield Row(case, "unpruned", "parameters", "", float(count_parameters(dense)))
    yield Row(case, "unpruned", "accuracy", "", _score(dense, workload))
    for importance in ("magnitude", "activation", "taylor"):
        system = f"modelpress {importance}"
        for repair in (False, True):
            module = copy.deepcopy(dense)
            prune_(module, workload, PruneConfig(sparsity=0.5, importance=importance, repair=repair))
            yield Row(case, system, f"accuracy {'after' if repair else 'before'} repair", "", _score(module, workload))
            models[system] = module
        yield Row(case, system, "parameters", "", float(count_parameters(models[system])))
    training = TrainConfig(epochs=2 if quick else 20, batch_size=64, learning_rate=3e-3)
    module = copy.deepcopy(dense)
    prune_(module, workload, PruneConfig(sparsity=0.5, recovery=training))
    yield Row(case, "modelpress activation", "accuracy after repair and recovery", "", _score(module, workload))
    yield from throughput(case, models, workload, quick)


def _encoder(quick: bool) -> Iterator[Row]:
    workload = Texts(
        encoder_config(calibration=16 if quick else 100, evaluation=16 if quick else 150, train=24 if quick else 800)
    )
    dense = workload.source()
    target = outputs(dense, workload)
    models = {"unpruned": dense}
    for cut in CUTS:
        case = f"encoder, {cut.name}"
        yield from quality(case, "unpruned", "", dense, workload, target)
        for importance in cut.importances:
            system = f"modelpress {importance}"
            config = PruneConfig(structures=[cut.structure], sparsity=cut.sparsity, importance=importance)
            for repair in (False, True):
                module = copy.deepcopy(dense)
                report = prune_(module, workload, config.model_copy(update={"repair": repair}))
                when = f" {'after' if repair else 'before'} repair"
                yield from quality(case, system, when, module, workload, target)
            yield Row(case, system, "parameters left", "", report.parameters_after / report.parameters_before)
            if importance == "activation":
                models[f"without {cut.name}"] = module
        if cut.name == RECOVERED:
            training = TrainConfig(epochs=1 if quick else 2, batch_size=16, learning_rate=3e-4)
            module = copy.deepcopy(dense)
            recovering = PruneConfig(structures=[cut.structure], sparsity=cut.sparsity, recovery=training)
            prune_(module, workload, recovering)
            yield from quality(case, "modelpress activation", " after repair and recovery", module, workload, target)
    yield from throughput("encoder, throughput", models, workload, quick)


def _score(module: nn.Module, workload: Workload) -> float:
    return float(workload.score(outputs(module, workload).numpy()).mean())


if __name__ == "__main__":
    main("methods.structured", measure, note=NOTE)
