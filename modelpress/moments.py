"""Second moments of what a linear or convolution layer reads, and what is computed from them.

Of a wide layer one such matrix outweighs a transformer's block. So sums, errors and factors are made in strips of
`STRIP` rows, and a factor has no matrix of its own: see `InverseFactor`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from modelpress.errors import StageError

UNFOLDED_ELEMENTS = 2**24
"""Of a convolution's inputs, unfolded at a time: a kernel of 3 × 3 makes nine of each."""

STRIP = 128
"""Rows of a second moment, or of its factor, that are worked on at a time."""

ERROR_ELEMENTS = 2**20
"""Of a weight whose outputs' error is measured, at a time."""


class Moments:
    """Σ x xᵀ of one layer's inputs; features in the order of the weight's columns.

    Args:
        layer: one that `unreadable` has nothing against.
        name: for errors.
        constant: append a constant input 1, for the bias.
        dtype: of the sum. Whoever inverts it needs float64.
    """

    def __init__(
        self, layer: nn.Module, name: str = "a layer", *, constant: bool = False, dtype: torch.dtype = torch.float64
    ) -> None:
        self.layer, self.name, self.constant = layer, name, constant
        weight = flat_weight(layer)
        self.features = weight.shape[1]
        size = self.features + int(constant)
        device = "cpu" if weight.is_meta else weight.device  # one on disk is worked on where it will be read to
        self._sum = torch.zeros(size, size, dtype=dtype, device=device)
        self._mirrored = True
        self.rows = 0

    @property
    def sum(self) -> Tensor:
        """Σ x xᵀ, (features, features), the constant last."""
        if not self._mirrored:
            for start, end in _strips(len(self._sum)):
                self._sum[end:, start:end] = self._sum[start:end, end:].T
            self._mirrored = True
        return self._sum

    @sum.setter
    def sum(self, moved: Tensor) -> None:
        """Take the same values at another place."""
        self._sum = moved

    def add(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        """Count one batch of the layer's inputs; `mask` (batch, length) leaves padded positions out.

        Raises:
            StageError: NaN or infinite inputs.
        """
        self._mirrored = False
        for part in _parts(self.layer, inputs.detach()):
            rows = _columns(self.layer, _without_padding(part, mask if isinstance(self.layer, nn.Linear) else None))
            rows = rows.float()
            if self.constant:
                rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
            for start, end in _strips(len(self._sum)):  # what is left of the diagonal is the same once more
                # Within a batch float32 is exact enough, and twice as fast.
                product = rows[:, start:end].T @ rows[:, start:]
                if not torch.isfinite(product).all():
                    raise _not_finite(self.name)
                self._sum[start:end, start:] += product
            self.rows += len(rows)


def _strips(size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of `STRIP` rows at a time."""
    return ((start, min(start + STRIP, size)) for start in range(0, size, STRIP))


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


def output_error(before: Tensor, after: Tensor, second_moment: Tensor, mask: Tensor | None = None) -> float:
    """‖(W − W')X‖² ÷ ‖WX‖² = tr(ΔHΔᵀ) ÷ tr(WHWᵀ), in float64; 0 where the layer gives nothing.

    Args:
        before: W, (outputs, features).
        after: W', of the same shape.
        second_moment: H, (features, features); what is above its diagonal is not read.
        mask: False where W' is zero whatever `after` says.
    """
    changed = whole = 0.0
    rows = max(1, ERROR_ELEMENTS // before.shape[1])
    for start in range(0, len(before), rows):
        part = slice(start, start + rows)
        weight, new = before[part].double(), after[part].double()
        if mask is not None:
            new = new.masked_fill(~mask[part], 0.0)
        whole += _energy(weight, second_moment)
        changed += _energy(weight - new, second_moment)
    return changed / whole if whole else 0.0


def _energy(weight: Tensor, second_moment: Tensor) -> float:
    """tr(WHWᵀ), from H's diagonal and what is below it."""
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for start, end in _strips(len(second_moment)):
        below = second_moment[start:end, :end].double().tril(start)  # twice there, but for the diagonal
        below.diagonal(start).mul_(0.5)
        total += 2 * ((weight[:, :end] @ below.T) * weight[:, start:end]).sum()
    return float(total)


class InverseFactor:
    """U, upper triangular, with UᵀU = (H + εI)⁻¹: what GPTQ and SparseGPT take their updates from.

    With H + εI = RRᵀ, R upper triangular (a Cholesky factor taken from the last row on), U is R⁻¹. Both are made in
    place above the diagonal of H's own matrix, which is symmetric and needs only the other half: with a strip of
    working memory there is one matrix, and not four.

    Args:
        second_moment: H, (features, features) float64. Read on and below its diagonal, overwritten above it.
        damping: ε as a share of H's mean diagonal. An H of zeros (a layer that sees only zeros) counts as the identity.
        name: of the layer, for the error.

    Raises:
        StageError: H is singular also with εI added.
    """

    def __init__(self, second_moment: Tensor, damping: float, name: str) -> None:
        self._matrix, self._strips = second_moment, list(_strips(len(second_moment)))
        mean = float(second_moment.diagonal().mean())
        self.diagonal = second_moment.diagonal() + (damping * mean if mean else 1.0)
        """Of U, (features,)."""
        for start, end in self._strips:
            self._matrix[start:end, end:] = self._matrix[end:, start:end].T
            self._put(start, end, self._matrix[start:end, start:end].tril(-1).T)
        if not (self._factor() and self._invert()):
            raise StageError(
                f"inverting the second moments of the inputs of {name}",
                found=f"a singular matrix of {len(second_moment)} features with {damping:g} of its mean diagonal added",
                expected="inputs that do not depend on each other, or enough damping",
                fix="raise the damping (0.01 is usual), or workload.calibration_samples",
            )

    def rows(self, start: int, end: int) -> Tensor:
        """U[start:end, start:], a copy."""
        rows = self._matrix[start:end, start:].triu(1)
        rows.diagonal().copy_(self.diagonal[start:end])
        return rows

    def _put(self, start: int, end: int, square: Tensor) -> None:
        """Write above the diagonal of a diagonal block, and leave what is below."""
        block = self._matrix[start:end, start:end]
        block.copy_(block.tril() + square.triu(1))

    def _factor(self) -> bool:
        """R in place of H + εI, from the last strip of columns to the first; False where there is none."""
        for start, end in reversed(self._strips):
            above = self.rows(start, end)[:, : end - start]
            square = above + above.triu(1).T
            lower, failed = torch.linalg.cholesky_ex(square.flip(0, 1))
            if failed:
                return False
            block = lower.flip(0, 1)
            self._put(start, end, block)
            self.diagonal[start:end] = block.diagonal()
            panel = self._matrix[:start, start:end]
            if start:
                panel.copy_(torch.linalg.solve_triangular(block.T, panel, upper=False, left=False))
            for top, bottom in self._strips[: start // STRIP]:
                self._matrix[top:bottom, bottom:start].addmm_(panel[top:bottom], panel[bottom:].T, alpha=-1.0)
                change = panel[top:bottom] @ panel[top:bottom].T
                self.diagonal[top:bottom] -= change.diagonal()
                self._put(top, bottom, self._matrix[top:bottom, top:bottom] - change)
        return True

    def _invert(self) -> bool:
        """U = R⁻¹ in place of R, from the first strip of columns to the last; False where it is not finite."""
        for start, end in self._strips:
            block = self.rows(start, end)[:, : end - start]
            inverse = torch.linalg.solve_triangular(block, torch.eye(end - start).to(block), upper=True)
            panel = self._matrix[:start, start:end] @ -inverse
            for top, bottom in self._strips[: start // STRIP]:
                self._matrix[top:bottom, start:end] = self.rows(top, bottom)[:, : start - top] @ panel[top:]
            self._put(start, end, inverse)
            self.diagonal[start:end] = inverse.diagonal()
            if not torch.isfinite(self._matrix[:end, start:end]).all():
                return False
        return True
