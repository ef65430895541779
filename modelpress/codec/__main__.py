"""Compile the codecs' loops ahead of their first use: `python -m modelpress.codec`.

They are compiled when they are first called, and cached. An image that is built once and started often calls this
while it is built.
"""

from __future__ import annotations

import time

import numpy as np

from modelpress.codec import CODECS, decode
from modelpress.config import CompressConfig
from modelpress.dtypes import DTYPES


def compile_all() -> None:
    """Code and decode a few elements in every way that there is."""
    raw = np.zeros(8 * 64, np.uint8)
    raw[::24] = 7
    for codec in CODECS.values():
        for dtype in (DTYPES["U8"], DTYPES["BF16"], DTYPES["F32"], DTYPES["F64"]):
            symbols = raw.size // dtype.itemsize
            streams = codec.encode(raw, dtype, CompressConfig())
            decode(codec, streams, dtype, symbols, max(symbols, 4096), doing=f"compiling {codec.codec_id}")


if __name__ == "__main__":
    started = time.perf_counter()
    compile_all()
    print(f"the codecs' loops are compiled ({time.perf_counter() - started:.1f} s)")
