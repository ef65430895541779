"""The fewest bytes that a sentence encoder is published in without being worse at retrieval: one run of the line."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks import pipeline
from benchmarks._report import Row, main

NOTE = """\
The recipe `configs/minilm-small.yaml`: each weight gets its own bits within one budget of disagreement, then the model
is trained within that plan. `bytes` of what is published count shards, graph, tokenizer and manifest; those of the
source are its checkpoint's. Asked: at least 10 times fewer, and non-inferior within 0.01 of the source's mean
reciprocal rank (one-sided, 95 %, paired, on held-out pairs).
"""


def measure(quick: bool) -> Iterable[Row]:
    """Rows of each stage and of the published pack."""
    return pipeline.rows("digits-quick" if quick else "minilm-small")


if __name__ == "__main__":
    main("methods.smallest", measure, note=NOTE)
