"""What a user brings: a model, data in three disjoint splits, a metric and example inputs.

Subclass `Workload` for your own (docs/bring-your-own.md does it in under 40 lines); the built-in ones are in
`modelpress.workloads`.
"""

from __future__ import annotations

import abc
import hashlib
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from modelpress.config import WorkloadConfig
from modelpress.errors import OverlapError, WorkloadError
from modelpress.progress import Progress, silent

if TYPE_CHECKING:
    from modelpress.process import Processing

Split = Literal["train", "calibration", "evaluation"]
Outputs = Literal["logits", "embeddings"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "evaluation")


@dataclass(frozen=True)
class Batch:
    """Inputs by the name of the model's `forward` parameter (first axis: samples), and targets for the loss."""

    inputs: dict[str, Tensor]
    targets: Tensor | None = None

    def __len__(self) -> int:
        return int(next(iter(self.inputs.values())).shape[0])

    def cut(self, parts: int) -> list[Batch]:
        """The batch in so many parts of its samples, in order, as equal as they can be; none is empty."""
        parts = min(parts, len(self))
        if parts <= 1:
            return [self]
        inputs = {name: tensor.tensor_split(parts) for name, tensor in self.inputs.items()}
        targets = self.targets.tensor_split(parts) if self.targets is not None else [None] * parts
        return [Batch({name: found[part] for name, found in inputs.items()}, targets[part]) for part in range(parts)]


class Workload(abc.ABC):
    """A model together with the data and the metric by which it is judged.

    The model takes the tensors of `Batch.inputs` as keyword arguments and returns one tensor, float, with samples on
    the first axis (logits, or embeddings).
    """

    metric: ClassVar[str]
    """Name of the metric; higher is better."""
    output_name: ClassVar[str] = "output"
    """Name of the graph's output."""
    outputs: ClassVar[Outputs] = "logits"
    """What the outputs are: a student learns the teacher's soft labels, or its embeddings."""
    trains_source: bool = False
    """Whether `source` trains the model in the run."""
    samples_stand_alone: ClassVar[bool] = True
    """Whether the loss of a batch is the mean over its samples: then a training may cut it when memory runs out."""
    evaluation_batch_size: int = 64
    """Samples whose outputs are held at once while the model is judged."""

    @abc.abstractmethod
    def source(self, progress: Progress = silent) -> nn.Module:
        """The trained model, in eval mode. Trains it first where the workload says so."""

    @abc.abstractmethod
    def skeleton(self, architecture: Mapping[str, Any]) -> nn.Module:
        """An untrained model of this kind. Empty `architecture`: the source's own. `distill.architecture` and
        checkpoints are rebuilt through it.

        Raises:
            WorkloadError: a key that it doesn't know.
        """

    @abc.abstractmethod
    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        """One pass over a split; in fixed order, or shuffled by `seed` (which may also augment)."""

    @abc.abstractmethod
    def score(self, outputs: np.ndarray) -> np.ndarray:
        """Per-sample scores, float64, from the model's outputs on the evaluation split in fixed order.

        Their mean is the metric. Intervals take its range for 0 to 1, or for that of the scores where they lie beyond.
        Outputs: (samples of the split, …), float32; of each batch, what `condense` made of it.
        """

    @abc.abstractmethod
    def identity(self) -> str:
        """Text that changes whenever model or data change: part of every cache key."""

    def condense(self, outputs: np.ndarray, batch: Batch) -> np.ndarray:  # noqa: ARG002
        """What `score` needs of a batch's outputs, samples first; default: all of it.

        Outputs that are too many to keep for a whole split (samples · length · vocabulary) are scored here.
        """
        return outputs

    def further_scores(self, outputs: np.ndarray) -> dict[str, np.ndarray]:  # noqa: ARG002
        """Per-sample scores of further metrics, by name, higher is better: reported beside `metric`, and judged where
        `gate.further_margins` names them."""
        return {}

    def slices(self) -> dict[str, np.ndarray]:
        """Groups of the evaluation samples, by name, such as a language or a class that must not suffer.

        Each is a vector of bool, (samples of the split,), in fixed order; a sample may be in several groups or in none.
        They are judged where `gate.slice_margin` or `gate.slice_floors` asks. `identity` changes with them.
        """
        return {}

    def shown(self, value: float) -> dict[str, float]:  # noqa: ARG002
        """The metric's value in the units that people know, by name (perplexity of a log-likelihood)."""
        return {}

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """The task's own loss; default: cross-entropy with `batch.targets`."""
        if batch.targets is None:
            raise WorkloadError(
                f"computing the loss of {type(self).__name__}",
                found="a batch without targets",
                expected="class numbers for cross-entropy",
                fix="give Batch.targets, override `loss`, or learn from the teacher alone: distill.alpha 1",
            )
        return nn.functional.cross_entropy(output, batch.targets)

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Names of axes that may differ per call, by input; default: axis 0 of each is `batch`."""
        return {name: {0: "batch"} for name in self.example(1)}

    def example(self, batch_size: int) -> dict[str, Tensor]:
        """Inputs from the calibration split, exactly `batch_size` samples (repeated where the split is shorter)."""
        inputs = next(self.batches("calibration", batch_size)).inputs
        have = next(iter(inputs.values())).shape[0]
        index = torch.arange(batch_size) % have
        return {name: tensor[index] for name, tensor in inputs.items()}

    def blank(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The input by which answers are explained, with nothing in it: its name and a tensor of its shape.

        Default: zeros, where there is one input of floats. `inputs` is a batch of one sample.

        Raises:
            WorkloadError: it is not clear what says nothing.
        """
        floats = [name for name, tensor in inputs.items() if tensor.is_floating_point()]
        if len(floats) != 1:
            raise WorkloadError(
                f"making a blank input of {type(self).__name__}",
                found=f"{len(floats)} inputs of floats among {', '.join(inputs)}",
                expected="one",
                fix="override Workload.blank, or set evaluate.attribution_samples to 0",
            )
        return {floats[0]: torch.zeros_like(inputs[floats[0]])}

    def sample_digests(self, split: Split) -> set[str]:
        """sha256 (hex) of each sample of a split, by content: proof that the splits are disjoint."""
        return {digest for batch in self.batches(split, 256) for digest in row_digests(batch)}

    def files(self) -> dict[str, bytes]:
        """Files that belong to the served model (tokenizer, labels), published with it."""
        return {}

    def processing(self) -> Processing | None:
        """How texts or images become the model's inputs, and its outputs what clients want; published with the model,
        as data, for a server to do. Files that it names are those of `files`. None: clients send tensors."""
        return None

    def weights(self) -> tuple[Path, str] | None:
        """The Hugging Face folder that `source` reads as it is, and what a name in its state dict has before that in
        the folder; None where the model comes from elsewhere.

        `skeleton({})` must build the same module."""
        return None

    def licence(self) -> str:
        """SPDX identifier or text of the source model's licence, for the manifest."""
        return "unknown"


def samples_digest(workload: Workload) -> str:
    """sha256 (hex) of the evaluation samples and targets in their order: scores pair only where it is the same."""
    digest = hashlib.sha256()
    for batch in workload.batches("evaluation", 256):
        tensors = dict(batch.inputs) if batch.targets is None else {**batch.inputs, "": batch.targets}
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)};".encode())
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def row_digests(batch: Batch) -> list[str]:
    """sha256 (hex) of each sample's inputs."""
    arrays = [tensor.cpu().numpy() for _, tensor in sorted(batch.inputs.items())]
    digests = []
    for row in range(len(batch)):
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(np.ascontiguousarray(array[row]).tobytes())
        digests.append(digest.hexdigest())
    return digests


@dataclass(frozen=True)
class SplitDigest:
    """A split by its content."""

    samples: int
    """Different samples."""
    sha256: str
    """Of their digests in ascending order, hex: the same in whatever order they come."""


def check_disjoint(workload: Workload) -> dict[Split, SplitDigest]:
    """Refuse splits that share a sample, and empty ones; what was seen of each comes back.

    Raises:
        OverlapError: two splits share samples.
        WorkloadError: a split is empty.
    """
    seen = {split: workload.sample_digests(split) for split in SPLITS}
    for split in SPLITS:
        if not seen[split]:
            raise WorkloadError(f"checking the {split} split", found="no samples", expected="at least one")
    for i, first in enumerate(SPLITS):
        for second in SPLITS[i + 1 :]:
            shared = seen[first] & seen[second]
            if shared:
                raise OverlapError(
                    f"checking that the {first} and {second} splits are disjoint",
                    found=f"{len(shared)} shared samples of {len(seen[first])} and {len(seen[second])}",
                    expected="none: quality measured on data that the model has seen says nothing",
                    fix=f"remove them from the {first} split",
                )
    return {split: _split_digest(found) for split, found in seen.items()}


def _split_digest(digests: set[str]) -> SplitDigest:
    joint = hashlib.sha256()
    for digest in sorted(digests):
        joint.update(digest.encode() + b"\n")
    return SplitDigest(len(digests), joint.hexdigest())


def load_workload(config: WorkloadConfig) -> Workload:
    """Make the workload that a config names.

    Raises:
        WorkloadError: the import path, the model or the data can't be loaded.
    """
    if config.kind != "custom":
        from modelpress import workloads

        return workloads.BUILT_IN[config.kind](config)
    module_name, _, attribute = config.factory.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise WorkloadError(
            f"importing workload.factory {config.factory!r}",
            found=str(error),
            expected="an importable 'package.module:callable'",
            fix="install the package in this environment, or set PYTHONPATH to its folder",
        ) from error
    workload = factory(**config.options)
    if not isinstance(workload, Workload):
        raise WorkloadError(
            f"calling workload.factory {config.factory!r}",
            found=type(workload).__name__,
            expected="a modelpress.workload.Workload",
        )
    return workload
