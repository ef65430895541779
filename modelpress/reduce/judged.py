"""What slices say of answers that were judged: confusions, ranks, and scores of single samples."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, FiniteFloat, model_validator

from modelpress.reduce.exact import Exact
from modelpress.reduce.partials import Count, Partial


class Confusion(Partial):
    """How often each class was answered where each class was right."""

    kind: Literal["confusion"] = "confusion"
    """Which partial this is."""
    classes: int = Field(ge=1, le=2**24)
    """Number of classes."""
    cells: dict[int, Annotated[int, Field(gt=0)]] = Field(default_factory=dict)
    """Counts by truth · classes + answer; pairs that did not occur are left out."""

    @model_validator(mode="after")
    def _check(self) -> Confusion:
        if any(not 0 <= cell < self.classes**2 for cell in self.cells):
            raise ValueError(f"a cell outside a table of {self.classes} classes")
        return self

    @classmethod
    def of(cls, truth: npt.ArrayLike, answers: npt.ArrayLike, classes: int) -> Confusion:
        """Of (samples,) class numbers.

        Raises:
            ValueError: a class that there is not, or not as many answers as truths.
        """
        right, given = np.asarray(truth, np.int64), np.asarray(answers, np.int64)
        if right.shape != given.shape or right.ndim != 1:
            raise ValueError(f"{right.size} truths and {given.size} answers")
        if right.size and (min(right.min(), given.min()) < 0 or max(right.max(), given.max()) >= classes):
            raise ValueError(f"a class outside 0 to {classes - 1}")
        cells, counts = np.unique(right * classes + given, return_counts=True)
        return cls(classes=classes, cells=dict(zip(cells.tolist(), counts.tolist(), strict=True)))

    def merge(self, other: Confusion) -> Confusion:
        """Counts of both."""
        if self.classes != other.classes:
            raise self._unlike("classes", self.classes, other.classes)
        cells = sorted(self.cells.keys() | other.cells.keys())
        return Confusion(
            classes=self.classes, cells={cell: self.cells.get(cell, 0) + other.cells.get(cell, 0) for cell in cells}
        )

    def accuracy(self) -> float:
        """Share of right answers.

        Raises:
            ValueError: no answers.
        """
        samples = sum(self.cells.values())
        if not samples:
            raise ValueError("an accuracy of nothing")
        return sum(count for cell, count in self.cells.items() if cell % (self.classes + 1) == 0) / samples

    def recall(self, truth: int) -> float | None:
        """Share of a class's samples that were answered with it; None where it has none."""
        rows = {cell % self.classes: count for cell, count in self.cells.items() if cell // self.classes == truth}
        return rows.get(truth, 0) / sum(rows.values()) if rows else None

    def precision(self, answer: int) -> float | None:
        """Share of the answers with a class that were right; None where there are none."""
        column = {cell // self.classes: count for cell, count in self.cells.items() if cell % self.classes == answer}
        return column.get(answer, 0) / sum(column.values()) if column else None


class Ranking(Partial):
    """At which place the right answer stood, of queries: shares within the first k, and the mean reciprocal rank."""

    kind: Literal["ranking"] = "ranking"
    """Which partial this is."""
    queries: Count = 0
    """Queries."""
    hits: dict[int, Count] = Field(default_factory=dict)
    """By k, the queries whose right answer stood within the first k."""
    reciprocals: Exact = Exact()
    """Σ 1 ÷ rank, each rounded as a float."""

    @classmethod
    def of(cls, ranks: npt.ArrayLike, within: tuple[int, ...] = (1, 5, 10)) -> Ranking:
        """Of (queries,) ranks, from 1 on; 0: not found.

        Raises:
            ValueError: a negative rank.
        """
        array = np.asarray(ranks, np.int64).reshape(-1)
        if (array < 0).any():
            raise ValueError("ranks begin with 1; 0 stands for none")
        found = array[array > 0]
        hits = {k: int(np.count_nonzero(found <= k)) for k in sorted(within)}
        return cls(queries=array.size, hits=hits, reciprocals=Exact.of(1.0 / found))

    def merge(self, other: Ranking) -> Ranking:
        """Counts and sums of both."""
        if self.hits.keys() != other.hits.keys():
            raise self._unlike("k", sorted(self.hits), sorted(other.hits))
        hits = {k: self.hits[k] + other.hits[k] for k in sorted(self.hits)}
        return Ranking(
            queries=self.queries + other.queries, hits=hits, reciprocals=self.reciprocals + other.reciprocals
        )

    def top(self, k: int) -> float:
        """Share of the queries whose right answer stood within the first k.

        Raises:
            ValueError: no queries, or a k that was not counted.
        """
        if not self.queries or k not in self.hits:
            raise ValueError(f"top {k} of {self.queries} queries, counted for {sorted(self.hits)}")
        return self.hits[k] / self.queries

    def mean_reciprocal_rank(self) -> float:
        """The float nearest to it.

        Raises:
            ValueError: no queries.
        """
        if not self.queries:
            raise ValueError("a mean of nothing")
        return float(self.reciprocals.fraction() / self.queries)


class PairedScores(Partial):
    """Scores of single samples, by the sample's number: what a paired interval needs, in whatever order it comes."""

    kind: Literal["paired-scores"] = "paired-scores"
    """Which partial this is."""
    scores: dict[int, FiniteFloat] = Field(default_factory=dict)
    """By sample."""
    baseline: dict[int, FiniteFloat] = Field(default_factory=dict)
    """Another model's, of the same samples; empty: none."""

    @model_validator(mode="after")
    def _check(self) -> PairedScores:
        if self.baseline and self.baseline.keys() != self.scores.keys():
            raise ValueError("scores and those of the baseline must be of the same samples")
        return self

    @classmethod
    def of(cls, first: int, scores: npt.ArrayLike, baseline: npt.ArrayLike | None = None) -> PairedScores:
        """Of (samples,) scores, numbered from `first` on."""
        return cls(scores=_numbered(first, scores), baseline={} if baseline is None else _numbered(first, baseline))

    def merge(self, other: PairedScores) -> PairedScores:
        """The samples of both.

        Raises:
            ValueError: they share one, or one of them is not paired.
        """
        shared = self.scores.keys() & other.scores.keys()
        if shared:
            raise ValueError(f"sample {min(shared)} stands in two slices, as do {len(shared) - 1} others")
        if self.scores and other.scores and bool(self.baseline) != bool(other.baseline):
            raise ValueError("scores that are paired cannot be merged with scores that are not")
        scores = dict(sorted((self.scores | other.scores).items()))
        return PairedScores(scores=scores, baseline=dict(sorted((self.baseline | other.baseline).items())))

    def vectors(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64] | None]:
        """Scores and the baseline's in the order of the samples, (samples,) float64.

        Raises:
            ValueError: a sample between the first and the last is missing.
        """
        places = sorted(self.scores)
        if places and places[-1] - places[0] + 1 != len(places):
            raise ValueError(f"{len(places)} scores of the samples {places[0]} to {places[-1]}")
        scores = np.array([self.scores[place] for place in places], np.float64)
        return scores, np.array([self.baseline[place] for place in places], np.float64) if self.baseline else None


def _numbered(first: int, scores: Any) -> dict[int, float]:
    return dict(enumerate(np.asarray(scores, np.float64).reshape(-1).tolist(), start=first))
