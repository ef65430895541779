"""Classes: numbers from 0 up without a gap, each with samples to learn it from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import islice

import numpy as np

from modelpress.errors import WorkloadError

MOST_CLASSES = 5
"""How many classes a server names for a text or an image."""
SHOWN = 5
"""Classes that an error names."""


def check_numbers(found: Collection[int], data: str) -> None:
    """Refuse labels that are not exactly the numbers from 0 up, before anything is made as large as the largest.

    Raises:
        WorkloadError: a number has no sample.
    """
    present = set(found)
    if present and max(present) >= len(present):
        missing = list(islice((number for number in range(len(present)) if number not in present), SHOWN))
        raise WorkloadError(
            f"numbering the classes of {data}",
            found=f"{len(present)} classes up to {max(present)}, and no sample of {missing}",
            expected="samples of every class from 0 up",
            fix="number the classes 0, 1, 2, … without a gap, or label the samples by name",
        )


def by_class(names: Sequence[str], numbers: Sequence[int]) -> dict[str, np.ndarray]:
    """The samples of each class, by `class NAME`: (samples,) bool each.

    Args:
        names: of the classes, in the order of their numbers.
        numbers: the class of each sample.
    """
    of = np.asarray(numbers)
    return {f"class {name}": of == number for number, name in enumerate(names)}


def check_trained(names: Sequence[str], trained: Collection[int], data: str) -> None:
    """Refuse classes that training never sees: those of `names` whose numbers are not in `trained`.

    Raises:
        WorkloadError: there is one.
    """
    seen = set(trained)
    unseen = [name for number, name in enumerate(names) if number not in seen]
    if unseen:
        raise WorkloadError(
            f"splitting the samples of {data}",
            found=f"none of class {', '.join(map(repr, unseen[:SHOWN]))} for training, of {len(names)} classes",
            expected="at least one training sample of each class",
            fix="raise workload.train_samples, bring more samples of the rare classes, or leave these out",
        )
