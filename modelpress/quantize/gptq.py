"""GPTQ: round column by column, and let the columns still to come make up for each column's error.

Frantar et al. 2022, arXiv:2210.17323, sections 3 and 4: with H = Σ x xᵀ over the layer's inputs and U the upper
Cholesky factor of H⁻¹, the error e = (w_i − q_i) / U_ii of column i is taken out of column j > i as e · U_ij.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelpress.errors import StageError
from modelpress.moments import STRIP, InverseFactor
from modelpress.quantize.groups import Earlier, Grid, GroupedWeight, encode, grouped, parameters_of

DAMPING = 0.01
"""Share of H's mean diagonal that is added to its diagonal."""

HELD = 0.6
"""Steps from which on a weight leaves its earlier code; rounding to the nearest leaves it from 0.5 on. Without a margin
one code that moves moves others after it, and a third of all differ (decision 0025)."""

_BLOCK = 128


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    act_order: bool = False,
    damping: float = DAMPING,
    earlier: Earlier | None = None,
    *,
    overwrite: bool = False,
) -> GroupedWeight:
    """Quantize a weight so that its layer's outputs on calibration data change little; zeros stay zeros.

    Args:
        weight: (out, in) float.
        hessian: (in, in), H = Σ x xᵀ, up to a positive factor. An input that was always zero rounds to the nearest.
        grid: bits, group size, symmetric or not, clipped or not.
        act_order: take the inputs of the largest H_ii first. Each group's scale then comes from the weights as they
            were (static groups), so that groups are of neighbours in any order.
        damping: share of the mean diagonal.
        earlier: whose scales and zero points are taken as they are. Its codes are, too, as long as they are within
            `HELD` steps of the weight, errors of the columns before included: what is left out goes to the columns
            still to come, as all rounding does here, so that a weight's change is not lost where its code holds.
        overwrite: whether a float64 `hessian` may be overwritten above its diagonal, and needs no copy; with
            `act_order` there is one all the same.

    Raises:
        StageError: H is not of this shape, not finite, or singular despite the damping; the weight is not finite.
    """
    scale, zero_point = (one.T.contiguous() for one in (earlier[:2] if earlier else parameters_of(weight, grid)))
    outputs, inputs = weight.shape
    _check_hessian(hessian, inputs)
    order = torch.arange(inputs)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
        hessian = hessian[torch.maximum(order[:, None], order), torch.minimum(order[:, None], order)]
    elif not overwrite:
        hessian = hessian.clone()
    factor = InverseFactor(hessian.double(), damping, "a layer that GPTQ rounds")
    left = weight.float().T[order]  # (in, out): what is worked on lies together
    pruned = left == 0
    sparse = bool(pruned.any())
    held = earlier.codes.T[order] if earlier else None
    codes = torch.empty(left.shape, dtype=torch.uint8)
    block = max(_BLOCK, grid.group_size)
    for start in range(0, inputs, block):
        end = min(start + block, inputs)
        errors, upper = torch.empty(end - start, outputs), factor.rows(start, end).float()
        for row in range(start, end):
            group = int(order[row]) // grid.group_size
            if earlier is None and not act_order and row % grid.group_size == 0:
                fresh = parameters_of(left[row : row + grid.group_size].T, grid)
                scale[group], zero_point[group] = fresh[0][:, 0], fresh[1][:, 0]
            code = encode(left[row], scale[group], zero_point[group], grid)
            if held is not None:
                off = left[row] / scale[group] + zero_point[group] - held[row]
                code = torch.where(off.abs() <= HELD, held[row], code)
            error = left[row] - (code - zero_point[group]) * scale[group]
            here = row - start
            errors[here] = error.div_(upper[here, here])
            left[row + 1 : end].addr_(upper[here, here + 1 : end - start], error, alpha=-1.0)
            codes[row] = code
            if sparse:  # a pruned weight stays pruned
                left[row + 1 : end].masked_fill_(pruned[row + 1 : end], 0.0)
        left[end:].addmm_(upper[:, end - start :].T, errors, alpha=-1.0)
        if sparse:
            left[end:].masked_fill_(pruned[end:], 0.0)
    del left, pruned
    return grouped(codes[order.argsort()].T.contiguous(), scale.T.contiguous(), zero_point.T.contiguous(), grid)


def _check_hessian(hessian: Tensor, inputs: int) -> None:
    strips = torch.split(hessian, STRIP)
    if hessian.shape != (inputs, inputs) or not all(bool(torch.isfinite(strip).all()) for strip in strips):
        raise StageError(
            "reading the Hessian for GPTQ",
            found=f"shape {list(hessian.shape)}, {int((~torch.isfinite(hessian)).sum())} values NaN or infinite",
            expected=f"finite values of shape {[inputs, inputs]}",
            fix="look for NaN or infinity in the calibration data, or use quantize.algorithm 'rtn'",
        )
