"""Graphs for execution providers that compile them: a cache of each model's own, and one row at a time.

Compilers name what they keep by the graph, by a file or by a key, and two versions of a model have the same graph with
other weights: a cache that they share could answer with the weights of the first. So each model's place in
it is named by its content.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from onnx import ModelProto

from modelpress.checkpoint import Checkpoint
from modelpress.container.tensors import to_bytes
from modelpress.errors import SetupError
from modelpress.providers import PROVIDERS

Feed = Mapping[str, np.ndarray]


def with_own_cache(provider: str, options: Mapping[str, str], checkpoint: Checkpoint) -> dict[str, str]:
    """A provider's options, with the part of its cache that is for this model alone.

    A folder of the cache gets a folder in it, which is made; a provider that takes a key gets one.

    Raises:
        SetupError: the folder can't be made.
    """
    about = PROVIDERS.get(provider)
    if about is None or (not about.cache_key and about.cache_folder not in options):
        return dict(options)
    content = digest(checkpoint)
    if about.cache_key:
        return {**options, about.cache_key: content}
    folder = os.path.join(options[about.cache_folder], content)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise SetupError(
            f"making a cache for a model on {provider}",
            found=str(error),
            expected="a folder that this process may write to",
            fix=f"set another {about.cache_folder} in MODELPRESS_PROVIDER_OPTIONS",
        ) from error
    return {**options, about.cache_folder: folder}


def digest(checkpoint: Checkpoint) -> str:
    """sha256 (hex) of a checkpoint's files and tensors, with their names, types and shapes."""
    whole = hashlib.sha256()
    for name in sorted(checkpoint.files):
        _add(whole.update, name, checkpoint.files[name])
    for name in sorted(checkpoint.tensors):
        tensor = checkpoint.tensors[name]
        _add(whole.update, f"{name} {tensor.dtype} {list(tensor.shape)}", to_bytes(tensor).data)
    return whole.hexdigest()


def _add(update: Callable[[bytes | memoryview], None], name: str, data: bytes | memoryview) -> None:
    update(f"{name}\0{memoryview(data).nbytes}\0".encode())
    update(data)


def row_axes(model: ModelProto) -> list[str]:
    """Names of the first axes of inputs that vary."""
    weights = {one.name for one in model.graph.initializer}
    firsts = [one.type.tensor_type.shape.dim[:1] for one in model.graph.input if one.name not in weights]
    return sorted({axis.dim_param for axes in firsts for axis in axes if axis.dim_param})


def by_row(run: Callable[[Feed], Sequence[np.ndarray]], feed: Feed) -> list[np.ndarray]:
    """The outputs of a graph whose first axes are fixed at 1, for any number of rows.

    Args:
        run: for one row.
        feed: named inputs, of equally many rows.
    """
    rows = len(next(iter(feed.values())))
    found = [run({name: values[row : row + 1] for name, values in feed.items()}) for row in range(rows)]
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]
