"""Slices that say things by name: answers by batch, sensitivities by weight. Merged, each name stands once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias, TypeVar

from pydantic import Field

from modelpress.reduce.judged import Confusion, PairedScores, Ranking
from modelpress.reduce.partials import ChannelMoments, Extremes, Histogram, Moments, Partial, WeightedMean
from modelpress.reports import TriedVariant
from modelpress.reports.base import ArtifactRef, Report

NameT = TypeVar("NameT", int, str)
ValueT = TypeVar("ValueT")
Unnamed: TypeAlias = WeightedMean | Moments | ChannelMoments | Extremes | Histogram | Confusion | Ranking | PairedScores
"""What merges without names."""
Numbers = Annotated[Unnamed, Field(discriminator="kind")]
"""The same, told apart by `kind`."""


class Piece(Report):
    """A model's answers to one batch."""

    samples: int = Field(ge=1)
    """Of the batch."""
    inputs_sha256: str
    """Of what was asked: names, dtypes, shapes and bytes."""
    file: ArtifactRef
    """Safetensors file with the answers, under the batch's number."""


class Answers(Partial):
    """A model's answers to batches of the evaluation split; the tensors themselves lie in the work store."""

    kind: Literal["answers"] = "answers"
    """Which partial this is."""
    pieces: dict[int, Piece] = Field(default_factory=dict)
    """By the batch's number."""
    peak_memory_bytes: int | None = None
    """The most that one process took above what it had before; None where none was seen."""

    def merge(self, other: Answers) -> Answers:
        """The batches of both.

        Raises:
            ValueError: they share one.
        """
        peaks = [one for one in (self.peak_memory_bytes, other.peak_memory_bytes) if one is not None]
        return Answers(pieces=union(self.pieces, other.pieces), peak_memory_bytes=max(peaks, default=None))


class Points(Partial):
    """Points of a plan's front, built and measured."""

    kind: Literal["points"] = "points"
    """Which partial this is."""
    points: dict[int, tuple[int, float]] = Field(default_factory=dict)
    """By the point's number: coded bytes, and disagreement."""

    def merge(self, other: Points) -> Points:
        """The points of both.

        Raises:
            ValueError: they share one.
        """
        return Points(points=union(self.points, other.points))


class Sensitivity(Report):
    """A form that a weight may take, and what it costs."""

    num_bits: int
    """Of its codes."""
    scale: int | Literal["tensor", "channel"]
    """What shares a scale."""
    sparsity: float
    """Fraction of zeros."""
    coded_bytes: int
    """Of its tensors, coded."""
    inline_bytes: int
    """Of those that stay in the graph's file."""
    error: float
    """Mean square of what was changed."""
    disagreement: float
    """With this weight alone changed."""
    is_measured: bool
    """Or foretold."""


class Sensitivities(Partial):
    """What slices of a plan's search measured."""

    kind: Literal["sensitivities"] = "sensitivities"
    """Which partial this is."""
    weights: dict[str, list[Sensitivity]] = Field(default_factory=dict)
    """By weight, its candidates in their order."""
    alike: dict[str, float] = Field(default_factory=dict)
    """By form, the disagreement with all weights in it."""
    floats: dict[str, tuple[int, int]] = Field(default_factory=dict)
    """By weight, coded bytes and inline bytes where it stays in float."""

    def merge(self, other: Sensitivities) -> Sensitivities:
        """The weights and forms of both.

        Raises:
            ValueError: they share one.
        """
        weights, floats = union(self.weights, other.weights), union(self.floats, other.floats)
        return Sensitivities(weights=weights, alike=union(self.alike, other.alike), floats=floats)


class Variants(Partial):
    """Variants of a recipe that were tried."""

    kind: Literal["variants"] = "variants"
    """Which partial this is."""
    tried: dict[int, TriedVariant] = Field(default_factory=dict)
    """By the variant's number."""

    def merge(self, other: Variants) -> Variants:
        """The variants of both.

        Raises:
            ValueError: they share one.
        """
        return Variants(tried=union(self.tried, other.tried))


class ByName(Partial):
    """Partials by name, such as the ranges of a graph's values, or figures of each class."""

    kind: Literal["by-name"] = "by-name"
    """Which partial this is."""
    values: dict[str, Numbers] = Field(default_factory=dict)
    """Of each name."""

    def merge(self, other: ByName) -> ByName:
        """Name by name; one that only one of them has is as it is there.

        Raises:
            ValueError: two of a name do not fit together.
        """
        merged: dict[str, Numbers] = {}
        for name in sorted(self.values.keys() | other.values.keys()):
            found = [one.values[name] for one in (self, other) if name in one.values]
            if len({one.kind for one in found}) > 1:
                raise ValueError(f"{name!r} is {found[0].kind} in one slice, and {found[1].kind} in another")
            merged[name] = found[0] if len(found) == 1 else found[0].merge(found[1])  # type: ignore[arg-type]
        return ByName(values=merged)


def union(one: Mapping[NameT, ValueT], two: Mapping[NameT, ValueT]) -> dict[NameT, ValueT]:
    """Both, by rising name.

    Raises:
        ValueError: they share a name.
    """
    shared = one.keys() & two.keys()
    if shared:
        raise ValueError(f"{min(shared)!r} stands in two slices, as do {len(shared) - 1} others")
    both = {**one, **two}
    return {name: both[name] for name in sorted(both)}
