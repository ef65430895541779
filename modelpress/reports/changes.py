"""What is different between two packs."""

from __future__ import annotations

from typing import Literal

from modelpress.reports.base import Report


class PackSide(Report):
    """One of the two."""

    name: str
    """Its name."""
    pack: str
    """Digest of its manifest."""
    raw_bytes: int
    """Bytes of all tensors and files, uncompressed."""
    published_bytes: int
    """Bytes of all blobs and of the manifest."""


class FieldChange(Report):
    """A value that differs."""

    field: str
    """Its dotted path, such as `quantize.method`, `versions.torch` or `lineage.source`."""
    before: str | None
    """JSON; None where there is no such field."""
    after: str | None
    """The same, of the other."""


class TensorDifference(Report):
    """A tensor that differs."""

    name: str
    """Its name."""
    what: Literal["added", "removed", "form", "values", "coding"]
    """`form`: another dtype or shape; `values`: the same form with other numbers; `coding`: the same numbers, stored
    otherwise."""
    before: str | None
    """Its dtype and shape; None where it is not there."""
    after: str | None
    """The same, of the other."""
    stored_before: int
    """Its coded bytes; 0 where it is not there."""
    stored_after: int
    """The same, of the other."""


class QualityDifference(Report):
    """A metric of both, on held-out data."""

    metric: str
    """Its name; higher is better."""
    before: float
    """Mean over the first one's samples."""
    after: float
    """Mean over the other's."""
    difference: float
    """after − before."""
    low: float
    """Lower end of its interval."""
    high: float
    """Upper end of its interval."""
    confidence: float
    """Two-sided confidence of the interval."""
    samples: int
    """The other's samples."""
    paired: bool
    """Whether they are the same samples; else the interval is that of two independent means, and wider."""


class ChangesReport(Report):
    """From one pack to another."""

    before: PackSide
    """Where it starts."""
    after: PackSide
    """Where it ends."""
    config: list[FieldChange]
    """Of the recipes."""
    about: list[FieldChange]
    """Of the rest of the manifests: kind, licence, versions, lineage, base, encryption."""
    tensors: list[TensorDifference]
    """Those that differ, by name."""
    equal_tensors: int
    """Those that do not."""
    files: list[FieldChange]
    """Files that differ, by name, with their digests."""
    shared_bytes: int
    """Bytes of blobs that both have, and that are stored once."""
    quality: list[QualityDifference]
    """Of each metric that both were measured by."""
    unmeasured: str | None
    """Why there is none; None where there is."""
