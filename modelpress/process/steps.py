"""What is done to the outputs of a graph: each step says what it makes of which shapes, and does it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from modelpress.errors import CorruptionError, WorkloadError
from modelpress.process.spec import MeanPool, Normalize, Processing, Softmax, Step, TopK

MAX_LABELS: Final = 10**6
Axis = int | str | None


@dataclass(frozen=True)
class Feature:
    """An input or output: dtype (object: text) and shape, with axes that may differ per call by name, or None."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[Axis, ...]


TEXT: Final = np.dtype(object)
FLOAT: Final = np.dtype(np.float32)
Arrays = dict[str, np.ndarray]


def declare(features: Mapping[str, Feature], step: Step, labels: int | None) -> dict[str, Feature]:
    """The outputs after a step.

    Args:
        features: those before it, by name.
        step: the step.
        labels: how many names of classes its file holds; None: it has none.

    Raises:
        WorkloadError: there is nothing of that name, its shape is not what the step takes, or a name stands twice.
    """
    doing = f"setting up the step {step.kind}"
    given = features.get(step.of)
    axes = {"mean-pool": 3, "top-k": 2}.get(step.kind)
    if given is None or given.dtype.kind != "f" or (axes is not None and len(given.shape) != axes) or not given.shape:
        found = "nothing" if given is None else f"{given.dtype} of {len(given.shape)} axes"
        raise WorkloadError(doing, found=f"{found} as {step.of!r}", expected=f"floats of {axes or 'one or more'} axes")
    kept = {name: one for name, one in features.items() if name != step.of or not isinstance(step, MeanPool)}
    made: list[Feature] = []
    if isinstance(step, MeanPool):
        made = [Feature(step.to, FLOAT, (given.shape[0], given.shape[2]))]
    elif isinstance(step, Normalize):
        kept[step.of] = Feature(step.of, FLOAT, given.shape)
    elif isinstance(step, Softmax):
        made = [Feature(step.to, FLOAT, given.shape)]
    else:
        classes = given.shape[1]
        if isinstance(classes, int) and labels is not None and classes != labels:
            raise WorkloadError(
                doing, found=f"{labels} names in {step.labels!r}", expected=f"one of {classes} classes each"
            )
        count = min(step.k, classes) if isinstance(classes, int) else None
        made = [
            Feature(step.to_labels, TEXT, (given.shape[0], count)),
            Feature(step.to_scores, FLOAT, (given.shape[0], count)),
        ]
    twice = sorted({one.name for one in made} & set(kept))
    if twice or len({one.name for one in made}) != len(made):
        raise WorkloadError(doing, found=f"another output named {twice or step.of}", expected="a name for each")
    return kept | {one.name: one for one in made}


def run(arrays: Arrays, step: Step, mask: np.ndarray | None, labels: list[bytes] | None) -> None:
    """Do a step, in place.

    Raises:
        WorkloadError: the graph gave more classes than there are names for.
    """
    given = arrays[step.of].astype(np.float32, copy=False)
    if isinstance(step, MeanPool):
        del arrays[step.of]
        arrays[step.to] = _mean(given, mask)
    elif isinstance(step, Normalize):
        length = np.sqrt((given * given).sum(axis=-1, keepdims=True))
        arrays[step.of] = given / np.maximum(length, np.float32(1e-12))
    elif isinstance(step, Softmax):
        powers = np.exp(given - given.max(axis=-1, keepdims=True))
        arrays[step.to] = powers / powers.sum(axis=-1, keepdims=True)
    else:
        arrays[step.to_labels], arrays[step.to_scores] = _greatest(given, step, labels)


def read_labels(data: bytes, name: str) -> list[bytes]:
    """Names of classes from a JSON list, as UTF-8.

    Raises:
        CorruptionError: it is none.
    """
    try:
        found = json.loads(data)
        if isinstance(found, list) and len(found) <= MAX_LABELS and all(isinstance(one, str) for one in found):
            return [one.encode() for one in found]
    except (ValueError, RecursionError) as error:
        raise CorruptionError(f"reading {name}", found=str(error)[:200], expected="a JSON list of names") from error
    raise CorruptionError(
        f"reading {name}", found="another value", expected=f"a JSON list of at most {MAX_LABELS} names"
    )


def check_names(
    spec: Processing, features: Mapping[str, Feature], labels: Mapping[str, list[bytes]]
) -> dict[str, Feature]:
    """The outputs behind all steps; see `declare`."""
    for step in spec.steps:
        names = labels.get(step.labels) if isinstance(step, TopK) and step.labels is not None else None
        features = declare(features, step, len(names) if names is not None else None)
    return dict(features)


def _mean(given: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """(batch, length, width) to (batch, width) float32, over the tokens of the mask, (batch, length)."""
    if mask is None:
        plain: np.ndarray = given.mean(axis=1)
        return plain
    weights = mask.astype(np.float32)[..., None]
    mean: np.ndarray = (given * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), np.float32(1))
    return mean


def _greatest(given: np.ndarray, step: TopK, labels: list[bytes] | None) -> tuple[np.ndarray, np.ndarray]:
    classes = given.shape[1]
    if labels is not None and classes > len(labels):
        raise WorkloadError(
            "naming classes", found=f"{classes} classes and {len(labels)} names", expected="a name for each class"
        )
    order = np.argsort(-given, axis=1, kind="stable")[:, : step.k]
    names = labels if labels is not None else [str(number).encode() for number in range(classes)]
    text = np.empty(order.shape, dtype=object)
    for at, number in np.ndenumerate(order):
        text[at] = names[number]
    return text, np.take_along_axis(given, order, axis=1)
