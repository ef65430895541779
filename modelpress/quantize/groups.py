"""Integer weights with one scale and zero point per row and group of inputs, and rounding to the nearest of them.

All functions take weights as (out, in) float tensors. A last group that is not full is one of its own: the missing
inputs count as zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from modelpress.errors import StageError

ELEMENTS = 2**19
"""Weights that are rounded at a time: the search takes several times their memory."""

SMALLEST_CLIP, CLIP_STEPS = 0.5, 26
"""The search for the best clipped range shrinks it down to this share, in so many steps."""


@dataclass(frozen=True)
class Grid:
    """Which values a weight may take within a group."""

    num_bits: int
    """Bits of a code; codes are 0 … 2^bits − 1."""
    group_size: int
    """Neighbouring inputs that share a scale and a zero point."""
    symmetric: bool = True
    """Whether the zero point is the middle code, 2^(bits − 1), everywhere."""
    clip: bool = True
    """Shrink each group's range to where its squared rounding error is least; without, the range holds every weight."""
    scale_dtype: torch.dtype = torch.float32
    """What the scales will be stored in; they are rounded to that before a code is chosen."""

    @property
    def levels(self) -> int:
        """The largest code."""
        return int(2**self.num_bits - 1)

    @property
    def middle(self) -> int:
        """The zero point of symmetric grids."""
        return int(2 ** (self.num_bits - 1))


@dataclass(frozen=True)
class GroupedWeight:
    """A weight as codes; group `g` of a row holds inputs `g · group_size` and following."""

    codes: Tensor
    """(out, in) uint8."""
    scale: Tensor
    """(out, groups) float32, above 0."""
    zero_point: Tensor
    """(out, groups): uint8, or float32 where the method finds real ones."""
    grid: Grid
    """What the codes mean."""

    def dequantize(self) -> Tensor:
        """(codes − zero point) · scale, (out, in) float32."""
        size, inputs = self.grid.group_size, self.codes.shape[1]
        weight = torch.empty(self.codes.shape)
        for start in range(0, inputs, size):
            columns, group = slice(start, start + size), slice(start // size, start // size + 1)
            codes = self.codes[:, columns].float()
            weight[:, columns] = codes.sub_(self.zero_point[:, group].float()).mul_(self.scale[:, group])
        return weight


class Earlier(NamedTuple):
    """What stands of a weight's earlier version."""

    scale: Tensor
    """(out, groups) float32."""
    zero_point: Tensor
    """(out, groups) float32, perhaps real."""
    codes: Tensor
    """(out, in) float32."""


def round_to_nearest(weight: Tensor, grid: Grid, earlier: Earlier | None = None) -> GroupedWeight:
    """RTN: each weight becomes the nearest value of its group's grid; zeros stay zeros.

    Args:
        weight: (out, in) float.
        grid: bits, group size, symmetric or not, clipped or not.
        earlier: whose scales and zero points are taken as they are.

    Raises:
        StageError: the weight is no matrix, or is not finite.
    """
    _check(weight)
    parts, step = [], _rows_at_a_time(weight)
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        groups = in_groups(weight[rows], grid.group_size)
        scale, zero_point = (earlier.scale[rows], earlier.zero_point[rows]) if earlier else parameters(groups, grid)
        codes = encode(groups, scale.unsqueeze(-1), zero_point.unsqueeze(-1), grid)
        parts.append(grouped(codes.flatten(1)[:, : weight.shape[1]], scale, zero_point, grid))
    return GroupedWeight(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat([part.zero_point for part in parts]),
        grid,
    )


def parameters_of(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """`parameters` of a matrix (out, in), some of its rows at a time.

    Raises:
        StageError: see `in_groups`.
    """
    _check(weight)
    rows = _rows_at_a_time(weight)
    found = [parameters(in_groups(part, grid.group_size), grid) for part in torch.split(weight, rows)]
    return torch.cat([scale for scale, _ in found]), torch.cat([zero_point for _, zero_point in found])


def _rows_at_a_time(weight: Tensor) -> int:
    return max(1, ELEMENTS // weight.shape[1])


def _check(weight: Tensor) -> None:
    if weight.ndim != 2 or not weight.numel() or not torch.isfinite(weight).all():
        raise StageError(
            "dividing a weight into groups",
            found=f"shape {list(weight.shape)}, {int((~torch.isfinite(weight)).sum())} of its values NaN or infinite",
            expected="a matrix (out, in) of finite values",
            fix="repair the model, or name the layer in quantize.ignore",
        )


def in_groups(weight: Tensor, group_size: int) -> Tensor:
    """The weight as (out, groups, group_size) float32, padded with zeros.

    Raises:
        StageError: it is no matrix, or is not finite.
    """
    _check(weight)
    missing = -weight.shape[1] % group_size
    padded = torch.nn.functional.pad(weight.float(), (0, missing))
    return padded.reshape(len(weight), -1, group_size)


def parameters(groups: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales and zero points, each (out, groups) float32, of weights that are (out, groups, group_size).

    Zero is always a value of the grid. A group of zeros has scale 1.
    """
    low, high = groups.amin(-1).clamp(max=0.0), groups.amax(-1).clamp(min=0.0)
    best = _range_parameters(low, high, grid)
    if not grid.clip:
        return best
    least = _squared_error(groups, *best, grid)
    for share in torch.linspace(1.0, SMALLEST_CLIP, CLIP_STEPS).tolist()[1:]:
        found = _range_parameters(low * share, high * share, grid)
        error = _squared_error(groups, *found, grid)
        better = error < least
        least = torch.where(better, error, least)
        best = (torch.where(better, found[0], best[0]), torch.where(better, found[1], best[1]))
    return best


def encode(weight: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Nearest codes as floats; all three must broadcast."""
    return (weight / scale + zero_point).round().clamp(0, grid.levels)


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scales, float32, as `dtype` holds them; never subnormal there, and 1 where all weights are zero.

    Where a scale would be subnormal in float32, any gives the weights back near enough.
    """
    kept = scale.clamp(min=torch.finfo(dtype).tiny).to(dtype).float()
    return torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, kept)


def grouped(codes: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> GroupedWeight:
    """Integer codes and zero points, given as floats, as a `GroupedWeight`."""
    return GroupedWeight(codes.to(torch.uint8), scale.float(), zero_point.to(torch.uint8), grid)


def _range_parameters(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    # Symmetric: half a step beyond the largest code, so that all 2^bits codes are in use and none errs by more.
    scale = torch.maximum(-low, high) * 2 / grid.levels if grid.symmetric else (high - low) / grid.levels
    scale = storable(scale, grid.scale_dtype)
    if grid.symmetric:
        return scale, torch.full_like(scale, grid.middle)
    return scale, (-low / scale).round().clamp(0, grid.levels)


def _squared_error(groups: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    scale, zero_point = scale.unsqueeze(-1), zero_point.unsqueeze(-1)
    return ((encode(groups, scale, zero_point, grid) - zero_point) * scale - groups).square().sum(-1)
