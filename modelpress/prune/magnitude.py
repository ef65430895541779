"""Unstructured pruning: the smallest weights become zero (Han et al. 2015, arXiv:1506.02626)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modelpress.config import PruneConfig
from modelpress.errors import CoverageError, StageError
from modelpress.progress import Progress
from modelpress.prune.outcome import Outcome
from modelpress.prune.select import select
from modelpress.reports import TensorChange
from modelpress.workload import Workload


def prune_magnitude_(module: nn.Module, workload: Workload, config: PruneConfig, progress: Progress) -> Outcome:  # noqa: ARG001
    """Set the smallest weights of linear and convolution layers to zero, in place.

    With scope `layer` each tensor of n weights gets exactly round(sparsity · n) zeros, with scope `global` all of them
    together do. Ties go to the weight that stands first, in the order of the module's names.

    Raises:
        ConfigError, CoverageError, StageError: see `prune_`.
    """
    weights = prunable_weights(module)
    names = select(list(weights), config.targets, config.ignore)
    chosen = {name: weights[name] for name in names}
    masks = global_masks(chosen, config.sparsity) if config.scope == "global" else layer_masks(chosen, config.sparsity)
    for name, mask in masks.items():
        if not mask.any():
            raise CoverageError(
                f"pruning {name}",
                found=f"all {mask.numel()} weights would become zero at sparsity {config.sparsity:g}",
                expected="at least one weight left",
                fix="lower prune.sparsity, set prune.scope to 'layer', or name the module in prune.ignore",
            )

    def hold() -> None:
        with torch.no_grad():
            for name, mask in masks.items():
                # Not a product: infinity times 0 is NaN, and -1 times 0 is a negative zero.
                chosen[name].masked_fill_(~mask, 0.0)

    hold()
    changes = [
        TensorChange(
            name=f"{name}.weight",
            before=list(weight.shape),
            after=list(weight.shape),
            zeros=int((weight == 0).sum()),
        )
        for name, weight in chosen.items()
        if not masks[name].all()
    ]
    return Outcome(
        eligible_parameters=sum(weight.numel() for weight in weights.values()),
        touched_parameters=sum(chosen[change.name.removesuffix(".weight")].numel() for change in changes),
        tensors=changes,
        hold=hold,
    )


def prunable_weights(module: nn.Module) -> dict[str, Tensor]:
    """Weights of linear and convolution layers by module name, shared ones once.

    Raises:
        CoverageError: there are none.
        StageError: one is not finite.
    """
    found: dict[str, Tensor] = {}
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | nn.Conv1d | nn.Conv2d) and not any(child.weight is w for w in found.values()):
            found[name] = child.weight
    if not found:
        raise CoverageError(
            f"pruning {type(module).__name__}",
            found="no linear or convolution layer",
            expected="at least one",
            fix="remove `prune` from the config",
        )
    for name, weight in found.items():
        if not torch.isfinite(weight).all():
            raise StageError(f"pruning {name}", found="weights that are NaN or infinite", expected="finite weights")
    return found


def layer_masks(weights: dict[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Masks, True where a weight stays, with exactly round(sparsity · n) False in each."""
    masks: dict[str, Tensor] = {}
    for name, weight in weights.items():
        masks[name] = _mask(weight.detach().abs().flatten(), sparsity).view_as(weight)
    return masks


def global_masks(weights: dict[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Masks with exactly round(sparsity · n) False over all weights together."""
    if not weights:
        return {}
    whole = _mask(torch.cat([weight.detach().abs().flatten() for weight in weights.values()]), sparsity)
    parts = torch.split(whole, [weight.numel() for weight in weights.values()])
    return {name: part.view_as(weight) for (name, weight), part in zip(weights.items(), parts, strict=True)}


def _mask(magnitudes: Tensor, sparsity: float) -> Tensor:
    removed = torch.argsort(magnitudes, stable=True)[: round(sparsity * magnitudes.numel())]
    mask = torch.ones_like(magnitudes, dtype=torch.bool)
    mask[removed] = False
    return mask
