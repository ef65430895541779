"""Least squares around a reading layer: what each of its inputs is worth, and how the rest makes up for a lost one.

For a layer y = W·x + b and inputs x seen on calibration data, H = E[x xᵀ] (with a constant 1 in x for the bias). When
inputs are removed, the weights of the others that keep y closest to what it was are
W' = W H[:, k] (H[k, k] + εI)⁻¹; the loss of removing a block is tr(W_b (H⁻¹_bb)⁻¹ W_bᵀ): the optimal brain surgeon
(Hassibi & Stork 1993) for whole inputs, as in ZipLM (Kurtic et al. 2023, arXiv:2302.04089).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from modelpress.errors import StageError
from modelpress.progress import Progress
from modelpress.workload import Workload

DAMPING = 1e-2
"""ε as a share of H's mean diagonal: keeps the inverse finite where inputs depend on each other."""

BATCH_SIZE = 32


class Moments:
    """H of one layer's inputs, float64, with the constant input last; features in the order of the weight's columns."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.features = flat_weight(layer).shape[1]
        self.sum = torch.zeros(self.features + 1, self.features + 1, dtype=torch.float64)
        self.samples = 0

    def add(self, inputs: Tensor, mask: Tensor | None) -> None:
        """Count one batch of the layer's inputs; `mask` (batch, length) leaves padded positions out."""
        rows = _columns(self.layer, inputs.detach())
        if mask is not None and mask.shape == inputs.shape[:-1]:
            rows = rows[mask.reshape(-1).bool()]
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        self.sum += (rows.T @ rows).double()  # within a batch float32 is exact enough, and twice as fast
        self.samples += len(rows)

    def damped(self) -> Tensor:
        """H with εI added.

        Raises:
            StageError: nothing was seen, or it is not finite.
        """
        mean = self.sum / max(1, self.samples)
        if not self.samples or not torch.isfinite(mean).all():
            raise StageError(
                "computing the moments of a layer's inputs",
                found="no calibration sample" if not self.samples else "activations that are NaN or infinite",
                expected="finite activations on the calibration data",
            )
        scale = float(mean.diagonal()[:-1].mean())
        damping = torch.full((len(mean),), DAMPING * scale or 1.0, dtype=torch.float64)
        damping[-1] = 0.0  # the bias is no weight
        return mean + torch.diag(damping)


def unreadable(layer: nn.Module) -> str:
    """Why the inputs of a layer cannot be judged; empty where they can."""
    if isinstance(layer, nn.Linear):
        return ""
    if not isinstance(layer, nn.Conv2d):
        return f"is a {type(layer).__name__}, no linear or 2-D convolution layer"
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        return f"pads by {layer.padding!r}, {layer.padding_mode}: only numbers and zeros are handled"
    return ""


def _columns(layer: nn.Module, inputs: Tensor) -> Tensor:
    """A layer's inputs as rows of what one output element sees, (positions, features)."""
    obstacle = unreadable(layer)
    if obstacle:
        raise StageError(
            "computing the moments of a layer's inputs",
            found=f"one that {obstacle}",
            fix="name what feeds it in prune.ignore",
        )
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        patches = nn.functional.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return patches.transpose(1, 2).reshape(-1, patches.shape[1])
    return inputs.reshape(-1, inputs.shape[-1])


def flat_weight(layer: nn.Module) -> Tensor:
    """A layer's weight as (outputs, features)."""
    return torch.as_tensor(layer.weight).detach().flatten(1)


@contextlib.contextmanager
def _observed(layers: dict[str, nn.Module], moments: dict[str, Moments], mask: list[Tensor | None]) -> Iterator[None]:
    def observe(name: str) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            moments[name].add(arguments[0], mask[0])

        return hook

    handles = [layer.register_forward_pre_hook(observe(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def collect(module: nn.Module, names: list[str], workload: Workload, progress: Progress) -> dict[str, Moments]:
    """`Moments` of the named layers over the calibration split, in one pass."""
    layers = {name: module.get_submodule(name) for name in names}
    moments = {name: Moments(layer) for name, layer in layers.items()}
    batches = list(workload.batches("calibration", BATCH_SIZE))
    mask: list[Tensor | None] = [None]
    with torch.no_grad(), _observed(layers, moments, mask):
        for index, batch in enumerate(batches):
            mask[0] = batch.inputs.get("attention_mask")
            module(**batch.inputs)
            progress(index + 1, len(batches), "moments of the layers' inputs")
    return moments


def plain_costs(weight: Tensor, moments: Tensor, block: int) -> Tensor:
    """Mean squared change of the outputs when each block of inputs alone is removed: tr(W_b H_bb W_bᵀ).

    Args:
        weight: (outputs, features) float64.
        moments: H, (features, features) float64.
        block: features per structure.

    Returns:
        (features ÷ block,) float64.
    """
    blocks, columns = _blocks(weight, moments, block)
    return (columns * (blocks @ columns)).sum(dim=(1, 2))


def repaired_costs(weight: Tensor, inverse: Tensor, block: int) -> Tensor:
    """The same with the best repair of the other inputs' weights: tr(W_b (H⁻¹_bb)⁻¹ W_bᵀ); takes H⁻¹."""
    blocks, columns = _blocks(weight, inverse, block)
    return (columns * torch.as_tensor(torch.linalg.solve(blocks, columns))).sum(dim=(1, 2))


def _blocks(weight: Tensor, matrix: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Diagonal blocks (count, block, block) of a matrix and the transposed columns (count, block, outputs) of W."""
    count = weight.shape[1] // block
    index = torch.arange(count * block).view(count, block)
    columns = weight.reshape(len(weight), count, block).permute(1, 2, 0)
    return matrix[index[:, :, None], index[:, None, :]], columns


def without(weight: Tensor, inverse: Tensor, removed: Tensor) -> tuple[Tensor, Tensor]:
    """Repaired weight and H⁻¹ after removing features: zero in the removed columns.

    Args:
        weight: (outputs, features) float64.
        inverse: H⁻¹ over at least these features.
        removed: indices of features.
    """
    coupling = torch.linalg.solve(inverse[removed][:, removed], inverse[removed])
    repaired = weight - weight[:, removed] @ coupling[:, : weight.shape[1]]
    remaining = inverse - inverse[:, removed] @ coupling
    # Exactly zero in theory; a removed feature must not couple to anything again.
    repaired[:, removed] = 0.0
    remaining[removed] = 0.0
    remaining[:, removed] = 0.0
    return repaired, remaining
