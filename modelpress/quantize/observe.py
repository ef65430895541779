"""What stands inside a graph while it runs: inner values on calibration data, and statistics of them.

One batch at a time is in memory. Positions that the input `attention_mask`, where there is one, leaves out do not
count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto, helper
from torch import Tensor

from modelpress import graph
from modelpress.errors import StageError
from modelpress.quantize.rewrite import replace_nodes

MASK = "attention_mask"
"""Input of which zeros mark padding."""

Inputs = dict[str, Tensor]
Floats = npt.NDArray[np.float32]


def observe(
    model: ModelProto, values: Sequence[str], batches: Iterable[Inputs], finite: bool = True
) -> Iterator[dict[str, Floats]]:
    """For each batch the named inner values as rows, (positions, features) float32, padded positions left out.

    A value of fewer than two axes, or whose leading axes are not the mask's, keeps all its positions.

    Raises:
        StageError: with `finite`, a value holds NaN or infinity.
    """
    session = graph.session(graph.split(until(model, values)))
    names = [one.name for one in session.get_inputs()]
    for batch in batches:
        found = session.run(list(values), {name: batch[name].numpy() for name in names})
        mask = batch[MASK].numpy().astype(bool) if MASK in batch else None
        if finite:
            for name, array in zip(values, found, strict=True):
                _check_finite(name, array)
        yield {name: _rows(array, mask) for name, array in zip(values, found, strict=True)}


def hessians(model: ModelProto, values: Sequence[str], batches: Sequence[Inputs]) -> dict[str, Tensor]:
    """H = Σ x xᵀ over the positions of each named value, (features, features) float64."""
    sums: dict[str, Tensor] = {}
    for rows in observe(model, values, batches):
        for name, array in rows.items():
            tensor = torch.from_numpy(array)
            found = (tensor.T @ tensor).double()  # within a batch float32 is exact enough, and twice as fast
            sums[name] = sums[name] + found if name in sums else found
    return sums


def _check_finite(name: str, array: Floats) -> None:
    if not np.isfinite(array).all():
        raise StageError(
            f"observing {name!r} on calibration data",
            found=f"{int(np.count_nonzero(~np.isfinite(array)))} values that are NaN or infinite",
            expected="finite activations",
            fix="look for NaN or infinity in the calibration data or in the model",
        )


def _rows(array: Floats, mask: npt.NDArray[np.bool_] | None) -> Floats:
    if mask is not None and array.shape[:-1] == mask.shape:
        return array[mask]
    return array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)


def until(model: ModelProto, values: Sequence[str]) -> ModelProto:
    """The part of the graph that the values need, with the values as its outputs."""
    part = ModelProto()
    part.CopyFrom(model)
    needed, kept = set(values), []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
            for attribute in node.attribute:
                for body in (attribute.g, *attribute.graphs):
                    needed.update(name for inner in body.node for name in inner.input)
    replace_nodes(part, kept[::-1])
    del part.graph.output[:]
    part.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in values)
    return part
