"""What a weight tensor may become: integer codes of some width, with a scale in all, per channel or per group, and
perhaps zeros in place of the weights that matter least."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from modelpress.config import Scale

Floats = npt.NDArray[np.float32]
Scales = npt.NDArray[np.float16] | npt.NDArray[np.float32]
"""float16 where every scale is one of its normal numbers: half the bytes, and a scale off by 2⁻¹¹ at most."""

HALF = np.finfo(np.float16)


@dataclass(frozen=True)
class Candidate:
    """One way to store a weight tensor as integers."""

    num_bits: int
    """Codes lie in ±(2^(bits − 1) − 1): as many above zero as below, and zero among them."""
    scale: Scale
    """What shares a scale: the tensor, an output channel (a row of a table), or so many neighbouring inputs of one."""
    sparsity: float = 0.0
    """Fraction of each output channel's weights that become zero before rounding."""

    def __str__(self) -> str:
        shared = f"groups of {self.scale}" if isinstance(self.scale, int) else f"scale per {self.scale}"
        zeros = f", {100 * self.sparsity:g} % zeros" if self.sparsity else ""
        return f"{self.num_bits} bits, {shared}{zeros}"

    @property
    def dense(self) -> Candidate:
        """The same without zeros of its own."""
        return replace(self, sparsity=0.0)

    @property
    def largest_code(self) -> int:
        """Of the codes."""
        return int(2 ** (self.num_bits - 1) - 1)


@dataclass(frozen=True)
class Coding:
    """A weight tensor as codes: `codes.reshape(grouped) · scale`, in the shape of the codes again."""

    codes: npt.NDArray[np.int8]
    """Of the weight's shape."""
    scale: Scales
    """Broadcasts to `grouped`."""
    grouped: tuple[int, ...]
    """The weight's shape; with groups, one axis cut in two."""

    def dequantize(self) -> Floats:
        """The weight that the codes stand for, float32, in the arithmetic of the graph."""
        values: Floats = self.codes.astype(np.float32).reshape(self.grouped) * self.scale.astype(np.float32)
        return values.reshape(self.codes.shape)


def fits(candidate: Candidate, shape: tuple[int, ...], channel_axis: int) -> bool:
    """Whether a candidate's groups divide the inputs of each output channel (any other candidate fits all)."""
    if not isinstance(candidate.scale, int):
        return True
    inputs = shape[-2] if _channels_last(shape, channel_axis) else int(np.prod(shape[1:]))
    return inputs % candidate.scale == 0 and inputs > candidate.scale


def encode(weight: Floats, candidate: Candidate, channel_axis: int, importance: Floats | None = None) -> Coding:
    """Round a finite weight to the nearest codes; each that does not become zero is within half a scale.

    Args:
        weight: float32, of two or more axes.
        candidate: one that `fits`.
        channel_axis: 0 or the last; it numbers the output channels.
        importance: broadcasts to the weight. The weights of least |weight| · importance become zero; with the root mean
            square of each input that is Wanda (Sun et al. 2023, arXiv:2306.11695). None: those of least magnitude.
    """
    grouped, shared = layout(weight.shape, candidate.scale, channel_axis)
    if candidate.sparsity:
        weight = np.where(zeros(weight, candidate.sparsity, channel_axis, importance), np.float32(0), weight)
    values = weight.reshape(grouped)
    largest = np.abs(values).max(axis=shared, keepdims=True) if shared else np.abs(values).max()
    scale = np.asarray(largest / candidate.largest_code, np.float32)
    # Zeros have no range: any scale gives them back. So has one whose scale would be subnormal.
    scale = np.where(scale < np.finfo(np.float32).tiny, np.float32(1.0), scale)
    stored: Scales = scale
    if scale.min() >= HALF.tiny and scale.max() <= HALF.max:
        stored = scale.astype(np.float16)
        scale = stored.astype(np.float32)
    codes = np.clip(np.rint(values / scale), -candidate.largest_code, candidate.largest_code).astype(np.int8)
    return Coding(codes.reshape(weight.shape), stored, grouped)


def zeros(
    weight: Floats, sparsity: float, channel_axis: int, importance: Floats | None = None
) -> npt.NDArray[np.bool_]:
    """Where `encode` puts the zeros of a candidate's sparsity: as many in each output channel, to the element."""
    score = np.abs(weight) if importance is None else np.abs(weight) * importance
    return _least(score, sparsity, channel_axis)


def _least(score: Floats, share: float, channel_axis: int) -> npt.NDArray[np.bool_]:
    """Where the smallest of each output channel's scores are, so many of them to the element."""
    rows = np.moveaxis(score, channel_axis, 0).reshape(score.shape[channel_axis], -1)
    taken = np.zeros(rows.shape, np.bool_)
    count = int(share * rows.shape[1])
    places = np.argpartition(rows, count, axis=1)[:, :count]
    np.put_along_axis(taken, places, True, axis=1)
    moved = tuple(np.moveaxis(score, channel_axis, 0).shape)
    return np.moveaxis(taken.reshape(moved), 0, channel_axis)


def layout(shape: tuple[int, ...], scale: Scale, channel_axis: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
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
