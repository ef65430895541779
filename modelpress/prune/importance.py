"""What a structure is worth by itself: the size of its weights, or what the loss loses without it.

What it changes in the layers that read it (`prune.importance: activation`) is in `modelpress.prune.repair`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from modelpress.errors import StageError, WorkloadError
from modelpress.moments import flat_weight
from modelpress.progress import Progress
from modelpress.prune.dependencies import Group
from modelpress.workload import Batch, Workload

BATCH_SIZE = 8
"""Samples whose gradients are added up before they are squared."""


def magnitudes(module: nn.Module, groups: list[Group]) -> list[Tensor]:
    """Sum of the squared weights that make each structure (as Li et al. 2016, arXiv:1608.08710, rank filters by L1).

    Returns:
        By group (size,) float64.
    """
    return [
        torch.stack([_rows(module, group, name).square().sum(dim=1) for name in group.producers]).sum(dim=0)
        for group in groups
    ]


def _rows(module: nn.Module, group: Group, name: str) -> Tensor:
    return flat_weight(module.get_submodule(name)).double().reshape(group.size, -1)


def taylor(module: nn.Module, groups: list[Group], workload: Workload, progress: Progress) -> list[Tensor]:
    """First-order change of the loss when each structure vanishes, squared, the sum over calibration batches.

    Molchanov et al. 2019 (arXiv:1906.10771) with a gate on each structure: Σ gradient · weight over the columns that
    read it is what the loss changes as the gate closes, exactly where one layer reads it.

    Returns:
        By group (size,) float64.

    Raises:
        StageError: see `losses`; a loss that does not depend on a weight, or gradients that are NaN or infinite.
    """
    found = [torch.zeros(group.size, dtype=torch.float64) for group in groups]
    weights = [[module.get_submodule(reader.name).weight for reader in group.readers] for group in groups]
    for loss in losses(module, workload, progress):
        flat = [torch.as_tensor(weight) for readers in weights for weight in readers]
        slopes = iter(_slopes(loss, flat, [reader.name for group in groups for reader in group.readers]))
        for scores, readers in zip(found, weights, strict=True):
            parts = [torch.as_tensor(weight).detach() * next(slopes) for weight in readers]
            scores += sum(part.double().flatten(1).sum(dim=0).view(len(scores), -1).sum(dim=1) for part in parts) ** 2
    for scores, group in zip(found, groups, strict=True):
        if not torch.isfinite(scores).all():
            raise StageError(
                f"measuring what the loss loses without {group.kind} of {group.producers[0]}",
                found="gradients that are NaN or infinite",
                expected="finite ones on the calibration data",
            )
    return found


def _slopes(loss: Tensor, weights: list[Tensor], names: list[str]) -> list[Tensor]:
    """Gradients of the loss.

    Raises:
        StageError: it does not depend on a weight, as far as torch has followed the computation.
    """
    found = torch.autograd.grad(loss, weights, allow_unused=True) if loss.requires_grad else [None] * len(weights)
    slopes = [slope for slope in found if slope is not None]
    if len(slopes) < len(weights):
        raise StageError(
            "measuring what the loss loses (prune.importance 'taylor')",
            found=f"a loss that does not depend on {names[[slope is None for slope in found].index(True)]}",
            expected="outputs whose gradients reach every layer that is judged",
            fix="remove .detach() or torch.no_grad() from the model's forward pass, name the layer in prune.ignore, "
            "or set prune.importance to 'activation'",
        )
    return slopes


def losses(module: nn.Module, workload: Workload, progress: Progress) -> Iterator[Tensor]:
    """The loss of each calibration batch, whose graph reaches all parameters; they stay as they are.

    Of logits it is the workload's own loss; where its batches have targets only if they are made with a seed, with one.
    Of embeddings it is Σ ±output with random signs. Their distance from the unpruned model's has no gradient at the
    unpruned model; but the squared slope of this sum is in the mean the second-order change of the squared distance,
    as E[(rᵀJw)²] = |Jw|² for signs r, the Jacobian J and a change of the weights w.

    Raises:
        StageError: the workload has no such loss.
    """
    batches = list(workload.batches("calibration", BATCH_SIZE))
    signed = workload.outputs == "embeddings"
    if not signed and batches and batches[0].targets is None:
        batches = list(workload.batches("calibration", BATCH_SIZE, 0))
    generator = torch.Generator().manual_seed(0)
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    module.requires_grad_(True)
    try:
        for index, batch in enumerate(batches):
            with torch.enable_grad():
                output = module(**batch.inputs)
                if signed:
                    loss = (output * (torch.randint(0, 2, output.shape, generator=generator) * 2 - 1)).sum()
                else:
                    loss = _own_loss(workload, output, batch)
            yield loss
            progress(index + 1, len(batches), "what the loss loses")
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _own_loss(workload: Workload, output: Tensor, batch: Batch) -> Tensor:
    try:
        return workload.loss(output, batch)
    except WorkloadError as error:
        raise StageError(
            "measuring what the loss loses (prune.importance 'taylor')",
            found=f"{error.doing}: {error.found}",
            expected="calibration batches with a loss",
            fix="give their batches targets, override Workload.loss, or set prune.importance to 'activation'",
        ) from error
