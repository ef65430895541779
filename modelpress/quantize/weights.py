"""Symmetric integer codes of float weights: w ≈ scale · code, code in −127..127.

The code −128 is left unused, so that the range is symmetric and the zero point is 0 everywhere.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LARGEST_CODE = 127

Floats = npt.NDArray[np.float32]


def quantize_symmetric(
    weights: Floats, axis: int | None, scale: Floats | None = None
) -> tuple[npt.NDArray[np.int8], Floats]:
    """Round to the nearest of 255 levels, with one scale per index of `axis`, or a single one.

    Args:
        weights: any shape, float32.
        axis: the channel axis, or None for one scale in all.
        scale: to be taken as it is, (channels,) or (); weights beyond its range get the largest code. By default the
            least that clips nothing.

    Returns:
        Codes, int8, of the weights' shape; scales, float32, of shape (channels,) or ().
    """
    if scale is not None:
        steps = scale if axis is None else scale.reshape([-1 if one == axis else 1 for one in range(weights.ndim)])
        return np.clip(np.rint(weights / steps), -LARGEST_CODE, LARGEST_CODE).astype(np.int8), scale
    if axis is None:
        largest = np.abs(weights).max(initial=0.0)
    else:
        others = tuple(other for other in range(weights.ndim) if other != axis)
        largest = np.abs(weights).max(axis=others, keepdims=True, initial=0.0)
    scale = np.asarray(largest / LARGEST_CODE, dtype=np.float32)
    # An all-zero channel has no range: any scale gives its zeros back. So has one whose scale would be subnormal.
    scale = np.where(scale < np.finfo(np.float32).tiny, np.float32(1.0), scale)
    codes = np.clip(np.rint(weights / scale), -LARGEST_CODE, LARGEST_CODE).astype(np.int8)
    return codes, scale if axis is None else scale.reshape(-1)


def relative_error(weights: Floats, codes: npt.NDArray[np.int8], scale: Floats) -> float:
    """Root-mean-square of the rounding error ÷ that of the weights; the scale must broadcast to the codes."""
    power = float(np.mean(np.square(weights, dtype=np.float64)))
    if power == 0:
        return 0.0
    error = np.mean(np.square(weights - codes * scale, dtype=np.float64))
    return float(np.sqrt(error / power))
