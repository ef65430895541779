"""Image classification: scikit-learn's digits, image files, a .parquet or an .npz, judged by accuracy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelpress.config import TrainConfig, WorkloadConfig
from modelpress.errors import WorkloadError
from modelpress.process import ImageInput, Processing, Softmax, TopK
from modelpress.process.spec import MAX_SIDE
from modelpress.progress import Progress, silent
from modelpress.workload import Batch, Split, Workload
from modelpress.workloads.classes import MOST_CLASSES, by_class, check_numbers, check_trained
from modelpress.workloads.digits_cnn import DigitsCNN
from modelpress.workloads.image_files import Images, read_images
from modelpress.workloads.image_models import build_named, is_named, load_weights
from modelpress.workloads.lenet import LeNet5, LeNet300
from modelpress.workloads.sources import seeded, trained

MODELS: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    "digits-cnn": (DigitsCNN, ("channels", "hidden")),
    "lenet-300-100": (LeNet300, ("hidden",)),
    "lenet-5": (LeNet5, ("channels", "hidden")),
}
"""By name: the model, and what `architecture` may hold for it."""

DIGITS = ("digits", "digits-28")
LENET_SIZE = 28
"""Height and width that `digits-28` is brought to: those of MNIST."""

EVALUATION_SHARE = 0.5
"""Of the distinct samples: the gate needs many paired samples more than a small network needs training data."""

MAX_ROTATION = 0.2
"""Radians."""
MAX_SHIFT = 0.15
"""Of half an image."""
MAX_SCALING = 0.1


class ImageClassification(Workload):
    """A network on `digits`, on `digits-28` (the same, brought to 28×28 pixels), a folder with a sub-folder of images
    per class, a .parquet with `image` and `label`, or an .npz with `images` (N, H, W[, C]), uint8 or floats from 0 to
    1, and `labels` (N,).

    The model is one of `MODELS`, or `timm:NAME` or `torchvision:NAME` as the installed library builds it; it is trained
    in the run, unless `WorkloadConfig.weights` has its weights.

    Samples that occur twice are taken once, so that the splits are disjoint by content. Shuffled training batches are
    rotated, scaled and shifted a little.

    Raises:
        WorkloadError: an unknown model, data that cannot be read or split, or a class without a training sample.
        SetupError: a library that the model or the data needs is missing.
    """

    metric = "accuracy"

    def __init__(self, config: WorkloadConfig) -> None:
        if config.model not in MODELS and not is_named(config.model):
            raise WorkloadError(
                "choosing the image-classification model",
                found=repr(config.model),
                expected=f"{', '.join(map(repr, MODELS))}, 'timm:NAME' or 'torchvision:NAME'",
                fix="bring your own module as a workload of kind 'custom'",
            )
        self.config = config
        self.trains_source = not config.weights
        images, labels, names = _load_data(config.data, config.image_size)
        images, labels = _distinct(images, labels)
        self.images = torch.from_numpy(images)
        self.labels = torch.from_numpy(labels)
        if not names:
            check_numbers(np.unique(labels).tolist(), config.data)
        self.classes = len(names) if names else int(labels.max()) + 1
        self.names = names or [str(label) for label in range(self.classes)]
        self.rows = _split_rows(len(images), config)
        if self.trains_source:
            check_trained(self.names, self.labels[self.rows["train"]].tolist(), config.data)

    def source(self, progress: Progress = silent) -> nn.Module:
        """The teacher, trained with AdamW from `WorkloadConfig.seed`, the same bits on the same machine and threads; or
        the weights that the config names."""
        if not self.trains_source:
            module = seeded(lambda: self.skeleton({}), self.config.seed)
            load_weights(module, Path(self.config.weights), self.config.model)
            return module.eval()
        training = TrainConfig(
            epochs=self.config.train_epochs,
            batch_size=64,
            learning_rate=2e-3,
            weight_decay=0.05,
            warmup_fraction=0.1,
            seed=self.config.seed,
        )
        return trained(self, lambda: self.skeleton({}), training, progress)

    def skeleton(self, architecture: Mapping[str, Any]) -> nn.Module:
        """The model that the config names; `architecture` may hold its widths, see `MODELS`, or, of a library's model,
        `model`: the name of another one."""
        sizes: dict[str, Any] = {**self.config.architecture, **architecture}
        make, widths = MODELS.get(self.config.model, (None, ("model",)))
        unknown = sorted(set(sizes) - set(widths))
        if unknown:
            raise WorkloadError(
                f"building {self.config.model}",
                found=f"unknown {', '.join(unknown)}",
                expected=", ".join(widths),
            )
        if make is None:
            return build_named(str(sizes.get("model", self.config.model)), self.classes).eval()
        colours, height, width = self.images.shape[1:]
        return make((colours, height, width), self.classes, **sizes).eval()

    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        """Batches of `image`, (batch, C, H, W) float32 in [0, 1], with targets (batch,) int64."""
        rows = self.rows[split]
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        if generator is not None:
            rows = rows[torch.randperm(len(rows), generator=generator)]
        for part in torch.split(rows, batch_size):
            images = self.images[part]
            if generator is not None and split == "train":
                images = _augment(images, generator)
            yield Batch({"image": images}, self.labels[part])

    def score(self, outputs: np.ndarray) -> np.ndarray:
        """1 where the largest logit is the label's, else 0. Outputs: (evaluation samples, classes)."""
        labels = self.labels[self.rows["evaluation"]].numpy()
        return np.asarray(outputs.argmax(axis=1) == labels, dtype=np.float64)

    def slices(self) -> dict[str, np.ndarray]:
        """The samples of each class, where the config asks for them."""
        if not self.config.slice_by_class:
            return {}
        return by_class(self.names, self.labels[self.rows["evaluation"]].tolist())

    def identity(self) -> str:
        """The config and the digest of the distinct samples, their names and the weights."""
        weights = Path(self.config.weights).read_bytes() if self.config.weights else b""
        facts = json.dumps(self.names).encode() + hashlib.sha256(weights).digest()
        digest = hashlib.sha256(self.images.numpy().tobytes() + self.labels.numpy().tobytes() + facts).hexdigest()
        return f"image-classification {json.dumps(self.config.model_dump(mode='json'), sort_keys=True)} {digest}"

    def files(self) -> dict[str, bytes]:
        """`labels.json`: the names of the classes in the order of the logits."""
        return {"labels.json": json.dumps(self.names).encode()}

    def processing(self) -> Processing | None:
        """Images in, the likeliest classes out, by name: read as files of images are read for training. None for images
        that are neither grey nor RGB, which no PNG or JPEG holds."""
        channels, height, width = self.images.shape[1:]
        if channels not in (1, 3) or max(height, width) > MAX_SIDE:
            return None
        image = ImageInput(pixels="image", mode="L" if channels == 1 else "RGB", height=height, width=width)
        steps = (Softmax(of=self.output_name), TopK(of="probabilities", k=min(MOST_CLASSES, self.classes)))
        return Processing(input=image, steps=steps)

    def licence(self) -> str:
        """The network is trained here, on UCI's digits (CC BY 4.0) or on the user's own images."""
        return "CC-BY-4.0" if self.config.data in DIGITS else "unknown"


def _load_data(source: str, size: int) -> tuple[np.ndarray, np.ndarray, list[str] | None]:
    """Images (N, C, H, W) float32 in [0, 1], labels (N,) int64, and the names of the classes if they have some."""
    if source in DIGITS:
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = np.asarray(digits.images, dtype=np.float32) / 16.0
        found = Images(_upsampled(pixels) if source == "digits-28" else pixels, np.asarray(digits.target))
    else:
        found = read_images(source, size)
    images, labels = found.pixels, found.labels
    if images.dtype == np.uint8:
        images = images.astype(np.float32) / np.float32(255.0)
    if images.ndim == 3:
        images = images[..., None]
    fits = (
        images.ndim == 4
        and images.size > 0
        and labels.ndim == 1
        and len(images) == len(labels)
        and np.issubdtype(labels.dtype, np.integer)
    )
    if not fits or not np.isfinite(images).all() or labels.min() < 0 or labels.max() > np.iinfo(np.int64).max:
        raise WorkloadError(
            f"reading images from {source}",
            found=f"images {images.shape} {images.dtype}, labels {labels.shape} {labels.dtype}",
            expected="finite images (N, H, W) or (N, H, W, C), at least one, and as many integer labels from 0 up",
        )
    if images.min() < 0 or images.max() > 1:
        raise WorkloadError(
            f"reading images from {source}",
            found=f"floats from {images.min():g} to {images.max():g}",
            expected="floats from 0 to 1, or uint8",
            fix="divide them by the largest value that a pixel can have, or save them as uint8",
        )
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels.astype(np.int64), found.names


def _upsampled(images: np.ndarray) -> np.ndarray:
    """(N, 8, 8) to (N, 28, 28), by bilinear interpolation."""
    large = nn.functional.interpolate(torch.from_numpy(images)[:, None], (LENET_SIZE, LENET_SIZE), mode="bilinear")
    return np.asarray(large[:, 0].clamp(0, 1).numpy())


def _distinct(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first of each set of equal images, in their order."""
    _, first = np.unique(images.reshape(len(images), -1), axis=0, return_index=True)
    first.sort()
    return images[first], labels[first]


def _split_rows(count: int, config: WorkloadConfig) -> dict[Split, Tensor]:
    """Shuffle by the seed; half for evaluation, `calibration_samples`, and the rest for training."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed))
    evaluation = int(count * EVALUATION_SHARE)
    train = count - evaluation - config.calibration_samples
    if train < 1:
        raise WorkloadError(
            "splitting the images",
            found=f"{count} distinct samples",
            expected=f"more than {evaluation} for evaluation and {config.calibration_samples} for calibration",
            fix="lower workload.calibration_samples or bring more data",
        )
    parts = torch.split(order, [evaluation, config.calibration_samples, train])
    return {
        "evaluation": parts[0][: config.evaluation_samples or None],
        "calibration": parts[1],
        "train": parts[2][: config.train_samples or None],
    }


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, scale and shift each image by a little, at random, with bilinear sampling."""
    draws = torch.rand(len(images), 4, generator=generator) * 2 - 1
    angle, scale = draws[:, 0] * MAX_ROTATION, 1 + draws[:, 1] * MAX_SCALING
    cosine, sine = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift = draws[:, 2:] * MAX_SHIFT
    matrix = torch.stack(
        [torch.stack([cosine, -sine, shift[:, 0]], 1), torch.stack([sine, cosine, shift[:, 1]], 1)], dim=1
    )
    grid = nn.functional.affine_grid(matrix, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False)
