"""All that the gate looks at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from modelpress import intervals
from modelpress.scores import Scored


@dataclass(frozen=True)
class Published:
    """What a fresh download of the published bytes found: every one of them was read from the store for this judgement,
    and each digest held."""

    read_bytes: int
    """Bytes that were read, the base's of a difference included."""
    size_bytes: int
    """Bytes of the pack itself: all blobs and the manifest."""
    signed_by: tuple[str, ...] | None
    """Who vouches for it by the trust file; None where there is no trust file, and nothing was asked."""


@dataclass(frozen=True)
class Figures:
    """What was measured of the served graph on one class of machines; None: not measured."""

    provider: str | None
    """ONNX Runtime execution provider in use."""
    p99_seconds: float | None
    """99th percentile of a call at the smallest measured batch."""
    throughput_per_second: float | None
    """Samples per second at the largest measured batch."""


@dataclass(frozen=True)
class Origin:
    """What the manifest says of where the pack comes from."""

    licence: str
    """SPDX identifier or text; `unknown` where nobody said."""
    missing: tuple[str, ...]
    """What of the lineage is not there: `source`, `config`, `versions`."""


@dataclass(frozen=True)
class Evidence:
    """What the gate is told. None: not measured."""

    candidate: Scored
    source: Scored
    champion: Scored | None
    """None: there is no champion yet."""
    compression_ratio: float | None
    """Source bytes ÷ published bytes."""
    speedup: float | None
    """Throughput ÷ the source model's, both in ONNX Runtime at the largest measured batch."""
    attribution: intervals.Interval | None
    """Rank correlation of the attributions with the source model's, both in ONNX Runtime."""
    coverage: float | None
    """Share of the eligible weights that are integers; read only where `quantized`."""
    quantized: bool
    """Whether the recipe asked for quantization."""
    attribution_confidence: float = 0.95
    """Of that interval, two-sided."""
    pruning_coverage: float | None = None
    """Share of the eligible weights in tensors that were pruned; read only where `pruned`."""
    pruned: bool = False
    """Whether the recipe asked for pruning."""
    published: Published | None = None
    """None: the published bytes were not read again, and nothing promotes them."""
    figures: Mapping[str, Figures] = field(default_factory=dict)
    """By class of machines."""
    origin: Origin | None = None
    """None: nobody looked."""
