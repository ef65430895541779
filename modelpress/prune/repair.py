"""Least squares around a reading layer: what each of its inputs is worth, and how the rest makes up for a lost one.

For a layer y = W·x + b and inputs x seen on calibration data, H = E[x xᵀ] (with a constant 1 in x for the bias). When
inputs are removed, the weights of the others that keep y closest to what it was are
W' = W H[:, k] (H[k, k] + εI)⁻¹; the loss of removing a block is tr(W_b (H⁻¹_bb)⁻¹ W_bᵀ): the optimal brain surgeon
(Hassibi & Stork 1993) for whole inputs, as in ZipLM (Kurtic et al. 2023, arXiv:2302.04089).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modelpress.errors import StageError
from modelpress.layerwise import observed
from modelpress.moments import Moments
from modelpress.progress import Progress
from modelpress.workload import Workload

DAMPING = 1e-2
"""ε as a share of H's mean diagonal: keeps the inverse finite where inputs depend on each other."""

BATCH_SIZE = 32

MIN_ROWS = 16
"""Fewer inputs say nothing about a layer."""


def damped(moments: Moments) -> Tensor:
    """H with εI added, from moments with the constant input.

    Raises:
        StageError: fewer than `MIN_ROWS` inputs were seen.
    """
    if moments.rows < MIN_ROWS:
        raise StageError(
            f"computing the moments of the inputs of {moments.name}",
            found=f"{moments.rows} rows on the calibration data",
            expected=f"at least {MIN_ROWS}: a repair from fewer fits them and nothing else",
            fix="raise workload.calibration_samples, or set prune.repair to false and prune.importance to 'magnitude'",
        )
    mean = moments.sum / moments.rows
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


def collect(module: nn.Module, names: list[str], workload: Workload, progress: Progress) -> dict[str, Moments]:
    """`Moments` of the named layers over the calibration split, in one pass."""
    moments = {name: Moments(module.get_submodule(name), name, constant=True) for name in names}
    batches = list(workload.batches("calibration", BATCH_SIZE))
    mask: list[Tensor | None] = [None]
    with torch.no_grad(), observed(module, moments, mask):
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
