"""Second moments of what a linear or convolution layer reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modelpress.errors import StageError

UNFOLDED_ELEMENTS = 2**24
"""Of a convolution's inputs, unfolded at a time: a kernel of 3 × 3 makes nine of each."""


class Moments:
    """Σ x xᵀ of one layer's inputs, float64; features in the order of the weight's columns.

    Args:
        layer: one that `unreadable` has nothing against.
        name: for errors.
        constant: append a constant input 1, for the bias.
    """

    def __init__(self, layer: nn.Module, name: str = "a layer", *, constant: bool = False) -> None:
        self.layer, self.name, self.constant = layer, name, constant
        weight = flat_weight(layer)
        self.features = weight.shape[1]
        size = self.features + int(constant)
        device = "cpu" if weight.is_meta else weight.device  # one on disk is worked on where it will be read to
        self.sum = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.rows = 0

    def add(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        """Count one batch of the layer's inputs; `mask` (batch, length) leaves padded positions out.

        Raises:
            StageError: NaN or infinite inputs.
        """
        for part in _parts(self.layer, inputs.detach()):
            rows = _columns(self.layer, _without_padding(part, mask if isinstance(self.layer, nn.Linear) else None))
            rows = rows.float()
            if self.constant:
                rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
            product = rows.T @ rows  # within a batch float32 is exact enough, and twice as fast
            if not torch.isfinite(product).all():
                raise _not_finite(self.name)
            self.sum += product.double()
            self.rows += len(rows)


def rows_seen(layer: nn.Module, name: str, inputs: Tensor, output: Tensor, mask: Tensor | None) -> int:
    """How many rows `Moments.add` would count, without the product.

    Raises:
        StageError: NaN or infinite inputs, where they are not padding.
    """
    if isinstance(layer, nn.Linear):
        inputs = _without_padding(inputs, mask)
        rows = inputs.numel() // layer.in_features
    else:
        rows = output.numel() // len(flat_weight(layer))
    if not torch.isfinite(inputs).all():
        raise _not_finite(name)
    return rows


def _not_finite(name: str) -> StageError:
    return StageError(
        f"computing the moments of the inputs of {name}",
        found="activations that are NaN or infinite",
        expected="finite activations on the calibration data",
    )


def unreadable(layer: nn.Module) -> str:
    """Why the inputs of a layer cannot be judged; empty where they can."""
    if isinstance(layer, nn.Linear):
        return ""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        return f"is a {type(layer).__name__}, no linear or convolution layer"
    return f"convolves in {layer.groups} groups, each with inputs of its own" if layer.groups != 1 else ""


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a layer was called with."""
    return torch.as_tensor(args[0] if args else kwargs["input"])


def flat_weight(layer: nn.Module) -> Tensor:
    """A layer's weight as (outputs, features)."""
    return torch.as_tensor(layer.weight).detach().flatten(1)


def _without_padding(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """(rows, features) of the positions that a mask keeps; the inputs as they are where it does not fit them."""
    if mask is None or mask.dim() != 2:
        return inputs
    fits = mask.shape == inputs.shape[:-1] or (inputs.dim() == 2 and len(inputs) == mask.numel())
    return inputs.reshape(-1, inputs.shape[-1])[mask.reshape(-1).bool()] if fits else inputs


def _parts(layer: nn.Module, inputs: Tensor) -> tuple[Tensor, ...]:
    """A convolution's batch in parts that unfold to `UNFOLDED_ELEMENTS`, or to one sample's."""
    if isinstance(layer, nn.Linear):
        return (inputs,)
    expansion = torch.as_tensor(layer.weight)[0, 0].numel()
    return torch.split(inputs, max(1, UNFOLDED_ELEMENTS // max(1, expansion * inputs[0].numel())))


def _columns(layer: nn.Module, inputs: Tensor) -> Tensor:
    """A layer's inputs as rows of what one output element sees, (positions, features)."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        return inputs.reshape(-1, inputs.shape[-1])
    # Zeros, or what `padding_mode` says; the module keeps it in the order that `pad` takes, also for 'same'.
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = nn.functional.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
    if isinstance(layer, nn.Conv1d):
        padded, kernel, dilation, stride = padded.unsqueeze(-2), (1, *kernel), (1, *dilation), (1, *stride)
    patches = nn.functional.unfold(padded, kernel, dilation, 0, stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def inverse_factor(second_moment: Tensor, damping: float, name: str) -> Tensor:
    """U, upper triangular, with UᵀU = (H + εI)⁻¹: what GPTQ and SparseGPT take their updates from.

    Args:
        second_moment: H, (features, features) float64.
        damping: ε as a share of H's mean diagonal. An H of zeros (a layer that sees only zeros) counts as the identity.
        name: of the layer, for the error.

    Returns:
        (features, features) float64.

    Raises:
        StageError: H is singular also with εI added.
    """
    mean = float(second_moment.diagonal().mean())
    epsilon = damping * mean if mean else 1.0
    damped = second_moment.clone()  # each matrix is let go as soon as it can be: of a wide layer they outweigh a block
    damped.diagonal().add_(epsilon)
    lower, failed = torch.linalg.cholesky_ex(damped)
    del damped
    if not failed:
        inverse = torch.cholesky_inverse(lower)
        del lower
        factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        del inverse
        if not failed and bool(torch.isfinite(factor).all()):
            return torch.as_tensor(factor)
    raise StageError(
        f"inverting the second moments of the inputs of {name}",
        found=f"a singular matrix of {len(second_moment)} features with {damping:g} of its mean diagonal added",
        expected="inputs that do not depend on each other, or enough damping",
        fix="raise the damping (0.01 is usual), or workload.calibration_samples",
    )
