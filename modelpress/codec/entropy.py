"""How small a tensor could get: the order-0 entropy of its byte planes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from modelpress.codec.base import Bytes
from modelpress.codec.coders import count_planes
from modelpress.dtypes import DType


def entropy_bits(counts: npt.NDArray[np.int64]) -> float:
    """Bits that no order-0 code of these symbol counts can go under (Shannon 1948, theorem 9)."""
    present = counts[counts > 0].astype(np.float64)
    return float(-(present * np.log2(present / present.sum())).sum()) if present.size > 1 else 0.0


def bound_bytes(raw: Bytes, dtype: DType) -> float:
    """Order-0 bound of a tensor's planes, in bytes; only codecs that see more than single bytes go under it."""
    return sum(entropy_bits(plane) for plane in count_planes(raw, dtype)) / 8
