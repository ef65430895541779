"""How small a tensor could get: the order-0 entropy of its byte planes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from modelpress.codec.base import Bytes
from modelpress.codec.coders import cut
from modelpress.codec.planes import split
from modelpress.dtypes import DType

BLOCK_SYMBOLS = 1 << 17


def histograms(raw: Bytes, dtype: DType) -> npt.NDArray[np.int64]:
    """Counts of every byte value in every plane: (itemsize, 256) int64."""
    counts = np.zeros((dtype.itemsize, 256), np.int64)
    for block in cut(raw, BLOCK_SYMBOLS * dtype.itemsize):
        for index, plane in enumerate(split(block, dtype)):
            counts[index] += np.bincount(plane, minlength=256)
    return counts


def entropy_bits(counts: npt.NDArray[np.int64]) -> float:
    """Bits that no order-0 code of these symbol counts can go under (Shannon 1948, theorem 9)."""
    present = counts[counts > 0].astype(np.float64)
    return float(-(present * np.log2(present / present.sum())).sum()) if present.size > 1 else 0.0


def bound_bytes(raw: Bytes, dtype: DType) -> float:
    """Order-0 bound of a tensor's planes, in bytes; only codecs that see more than single bytes go under it."""
    return sum(entropy_bits(plane) for plane in histograms(raw, dtype)) / 8
