"""What a weight tensor may become: integer codes of some width, with a scale in all, per channel or per group."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelpress.config import Scale

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Candidate:
    """One way to store a weight tensor as integers."""

    num_bits: int
    """Codes lie in ±(2^(bits − 1) − 1): as many above zero as below, and zero among them."""
    scale: Scale
    """What shares a scale: the tensor, an output channel (a row of a table), or so many neighbouring inputs of one."""

    def __str__(self) -> str:
        shared = f"groups of {self.scale}" if isinstance(self.scale, int) else f"scale per {self.scale}"
        return f"{self.num_bits} bits, {shared}"

    @property
    def largest_code(self) -> int:
        """Of the codes."""
        return int(2 ** (self.num_bits - 1) - 1)


@dataclass(frozen=True)
class Coding:
    """A weight tensor as codes: `codes.reshape(grouped) · scale`, in the shape of the codes again."""

    codes: npt.NDArray[np.int8]
    """Of the weight's shape."""
    scale: Floats
    """Broadcasts to `grouped`."""
    grouped: tuple[int, ...]
    """The weight's shape; with groups, one axis cut in two."""

    def dequantize(self) -> Floats:
        """The weight that the codes stand for, float32, in the arithmetic of the graph."""
        values: Floats = self.codes.astype(np.float32).reshape(self.grouped) * self.scale
        return values.reshape(self.codes.shape)


def fits(candidate: Candidate, shape: tuple[int, ...], channel_axis: int) -> bool:
    """Whether a candidate's groups divide the inputs of each output channel (any other candidate fits all)."""
    if not isinstance(candidate.scale, int):
        return True
    inputs = shape[-2] if _channels_last(shape, channel_axis) else int(np.prod(shape[1:]))
    return inputs % candidate.scale == 0 and inputs > candidate.scale


def encode(weight: Floats, candidate: Candidate, channel_axis: int) -> Coding:
    """Round a finite weight to the nearest codes; each is within half a scale.

    Args:
        weight: float32, of two or more axes.
        candidate: one that `fits`.
        channel_axis: 0 or the last; it numbers the output channels.
    """
    grouped, shared = _layout(weight.shape, candidate.scale, channel_axis)
    values = weight.reshape(grouped)
    largest = np.abs(values).max(axis=shared, keepdims=True) if shared else np.abs(values).max()
    scale = np.asarray(largest / candidate.largest_code, np.float32)
    # Zeros have no range: any scale gives them back. So has one whose scale would be subnormal.
    scale = np.where(scale < np.finfo(np.float32).tiny, np.float32(1.0), scale)
    codes = np.clip(np.rint(values / scale), -candidate.largest_code, candidate.largest_code).astype(np.int8)
    return Coding(codes.reshape(weight.shape), scale, grouped)


def _layout(shape: tuple[int, ...], scale: Scale, channel_axis: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape in which scales broadcast, and the axes along which weights share one; none: all of them do."""
    if scale == "tensor":
        return shape, ()
    last = _channels_last(shape, channel_axis)
    if scale == "channel":
        axis = len(shape) - 1 if last else 0
        return shape, tuple(other for other in range(len(shape)) if other != axis)
    if last:
        return (*shape[:-2], shape[-2] // scale, scale, shape[-1]), (len(shape) - 1,)
    return (shape[0], int(np.prod(shape[1:])) // scale, scale), (2,)


def _channels_last(shape: tuple[int, ...], channel_axis: int) -> bool:
    return channel_axis == len(shape) - 1
