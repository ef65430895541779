"""The difference of two tensors of one dtype and shape, word by word, modulo 2^bits: exact for every dtype.

Codes of a few neighbouring levels give small differences, and equal ones zeros, which the codecs for sparse tensors
store in next to nothing. Two 4-bit codes in a byte need no rule of their own: as long as neither moves by more than 7,
the difference of the bytes tells the two differences apart, so that it has their entropy (decision 0025).
"""

from __future__ import annotations

from modelpress.codec.base import WORDS, Bytes
from modelpress.dtypes import DType


def subtract(raw: Bytes, base: Bytes, dtype: DType) -> Bytes:
    """What must be added to `base` to get `raw`; all are (elements · itemsize,) uint8 and aligned to the element."""
    words = WORDS[dtype.itemsize]
    return (raw.view(words) - base.view(words)).view("u1")


def add_(base: Bytes, difference: Bytes, dtype: DType) -> Bytes:
    """Undo `subtract`, in the memory of `base`."""
    words = WORDS[dtype.itemsize]
    base.view(words)[...] += difference.view(words)
    return base
