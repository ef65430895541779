"""What one slice of the data says, and how two of them become one: typed, small, and JSON.

Everything here but `ChannelMoments` merges exactly: sums are `Exact`, the rest is counted or compared. So the merge is
associative and commutative to the bit, and however the data was cut, the result is the one of a single process.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Annotated, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import Field, FiniteFloat, PlainSerializer, model_validator

from modelpress.reduce.exact import Exact
from modelpress.reports.base import Report

PartialT = TypeVar("PartialT", bound="Partial")
Count = Annotated[int, Field(ge=0)]
AnyFloat = Annotated[
    float, PlainSerializer(lambda value: value if math.isfinite(value) else str(value), when_used="json")
]
"""JSON has no infinity and no NaN: they are texts there, which are read as floats again."""


class Partial(Report):
    """Base of what slices say."""

    def merge(self: PartialT, other: PartialT) -> PartialT:
        """What both say together.

        Raises:
            ValueError: they do not speak of the same thing.
        """
        raise NotImplementedError

    def _unlike(self, what: str, here: object, there: object) -> ValueError:
        return ValueError(f"{type(self).__name__} of {what} {here} cannot be merged with one of {there}")


class WeightedMean(Partial):
    """Σ w·x ÷ Σ w."""

    kind: Literal["weighted-mean"] = "weighted-mean"
    """Which partial this is."""
    count: Count = 0
    """Values."""
    total: Exact = Exact()
    """Σ w·x."""
    weight: Exact = Exact()
    """Σ w."""

    @classmethod
    def of(cls, values: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> WeightedMean:
        """Of (samples,) values; each weighs 1 where no weights are given.

        Raises:
            ValueError: a value or weight that is not finite, a negative weight, or not as many weights as values.
        """
        array = np.asarray(values, np.float64).reshape(-1)
        if weights is None:
            return cls(count=array.size, total=Exact.of(array), weight=Exact.make(array.size))
        if (np.asarray(weights) < 0).any():
            raise ValueError("weights must not be negative")
        return cls(count=array.size, total=Exact.dot(array, weights), weight=Exact.of(weights))

    def merge(self, other: WeightedMean) -> WeightedMean:
        """Sums of both."""
        count, total = self.count + other.count, self.total + other.total
        return WeightedMean(count=count, total=total, weight=self.weight + other.weight)

    def mean(self) -> float:
        """The float nearest to the mean.

        Raises:
            ValueError: nothing weighs anything.
        """
        weight = self.weight.fraction()
        if weight == 0:
            raise ValueError("a mean of nothing")
        return float(self.total.fraction() / weight)


class Moments(Partial):
    """Count, mean and variance of numbers, from Σ x and Σ x², both exact: nothing cancels."""

    kind: Literal["moments"] = "moments"
    """Which partial this is."""
    count: Count = 0
    """Numbers."""
    total: Exact = Exact()
    """Σ x."""
    squares: Exact = Exact()
    """Σ x²."""

    @classmethod
    def of(cls, values: npt.ArrayLike) -> Moments:
        """Of values of any shape.

        Raises:
            ValueError: one is not finite.
        """
        array = np.asarray(values, np.float64)
        return cls(count=array.size, total=Exact.of(array), squares=Exact.dot(array, array))

    def merge(self, other: Moments) -> Moments:
        """Sums of both."""
        count, total = self.count + other.count, self.total + other.total
        return Moments(count=count, total=total, squares=self.squares + other.squares)

    def mean(self) -> float:
        """The float nearest to it.

        Raises:
            ValueError: no numbers.
        """
        if not self.count:
            raise ValueError("a mean of nothing")
        return float(self.total.fraction() / self.count)

    def variance(self, unbiased: bool = False) -> float:
        """The float nearest to Σ (x − mean)² ÷ count; `unbiased`: ÷ (count − 1).

        Raises:
            ValueError: not enough numbers.
        """
        if self.count < 1 + unbiased:
            raise ValueError(f"a variance of {self.count} numbers")
        spread: Fraction = self.squares.fraction() - self.total.fraction() ** 2 / self.count
        return float(spread / (self.count - unbiased))


class ChannelMoments(Partial):
    """Mean and sum of squared deviations of each channel, merged as in Chan, Golub & LeVeque (1979, STAN-CS-79-773).

    For many channels, where exact sums would cost too much. The merge rounds: a result of any cut is within `bound`
    times each channel's Σ x² (its root mean square, for the mean) of the exact one. A `Ledger` merges in the order of
    the slices, so that one cut always gives the same bits.
    """

    kind: Literal["channel-moments"] = "channel-moments"
    """Which partial this is."""
    count: Count = 0
    """Rows."""
    means: list[FiniteFloat] = Field(default_factory=list)
    """Of each channel."""
    deviations: list[FiniteFloat] = Field(default_factory=list)
    """Of each channel, Σ (x − mean)²."""

    @classmethod
    def of(cls, rows: npt.ArrayLike) -> ChannelMoments:
        """Of (rows, channels), in float64.

        Raises:
            ValueError: no matrix, or a value that is not finite.
        """
        array = np.asarray(rows, np.float64)
        if array.ndim != 2 or not np.isfinite(array).all():
            raise ValueError(f"channels need a finite matrix of (rows, channels), not shape {list(array.shape)}")
        if not len(array):
            return cls(means=[0.0] * array.shape[1], deviations=[0.0] * array.shape[1])
        means = array.mean(axis=0)
        deviations = np.square(array - means).sum(axis=0)
        return cls(count=len(array), means=means.tolist(), deviations=deviations.tolist())

    def merge(self, other: ChannelMoments) -> ChannelMoments:
        """Chan's update; the same bits whichever comes first."""
        if len(self.means) != len(other.means):
            raise self._unlike("channels", len(self.means), len(other.means))
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        one, two = np.asarray(self.means), np.asarray(other.means)
        means = (self.count * one + other.count * two) / count
        between = np.square(two - one) * (self.count * other.count / count)
        deviations = np.asarray(self.deviations) + np.asarray(other.deviations) + between
        return ChannelMoments(count=count, means=means.tolist(), deviations=deviations.tolist())

    def bound(self, parts: int) -> float:
        """How far from the exact result one of up to `parts` merged parts lies, relative to a channel's Σ x²: the
        number of roundings on the longest way through a sum, times 2⁻⁵². Squares below 2⁻¹⁰²² are lost beside it."""
        return float((4 * math.log2(max(self.count, 2)) + 64 + 8 * parts) * np.finfo(np.float64).eps)


class Extremes(Partial):
    """Smallest and largest of each channel. NaN is neither and both: it shows in the result."""

    kind: Literal["extremes"] = "extremes"
    """Which partial this is."""
    lows: list[AnyFloat] = Field(default_factory=list)
    """Of each channel; infinity where nothing was seen."""
    highs: list[AnyFloat] = Field(default_factory=list)
    """Of each channel; −infinity where nothing was seen."""

    @classmethod
    def of(cls, rows: npt.ArrayLike) -> Extremes:
        """Of (rows, channels); a vector is one channel."""
        array = np.asarray(rows, np.float64)
        array = array.reshape(-1, 1) if array.ndim < 2 else array
        lows = array.min(axis=0, initial=math.inf) + 0.0  # −0 and 0 are one number, and must be one text
        return cls(lows=lows.tolist(), highs=(array.max(axis=0, initial=-math.inf) + 0.0).tolist())

    def merge(self, other: Extremes) -> Extremes:
        """The smaller and the larger of each."""
        if len(self.lows) != len(other.lows):
            raise self._unlike("channels", len(self.lows), len(other.lows))
        lows = np.minimum(self.lows, other.lows).tolist()
        return Extremes(lows=lows, highs=np.maximum(self.highs, other.highs).tolist())


class Histogram(Partial):
    """Counts between fixed ends, as `numpy.histogram` counts; what lies outside is counted by itself."""

    kind: Literal["histogram"] = "histogram"
    """Which partial this is."""
    low: float = Field(allow_inf_nan=False)
    """Lower end of the first bin."""
    high: float = Field(allow_inf_nan=False)
    """Upper end of the last bin, which belongs to it."""
    counts: list[Count] = Field(min_length=1, max_length=2**20)
    """Of each bin; all are equally wide."""
    outside: Count = 0
    """Values below, above, or NaN."""

    @model_validator(mode="after")
    def _check(self) -> Histogram:
        if self.low >= self.high:
            raise ValueError(f"a histogram from {self.low} to {self.high} has no width")
        return self

    @classmethod
    def of(cls, values: npt.ArrayLike, bins: int, low: float, high: float) -> Histogram:
        """Of values of any shape."""
        array = np.asarray(values).reshape(-1)
        counts = np.histogram(array[~np.isnan(array)], bins, (low, high))[0]
        return cls(low=low, high=high, counts=counts.tolist(), outside=array.size - int(counts.sum()))

    def merge(self, other: Histogram) -> Histogram:
        """Counts of both; the bins must be the same."""
        here, there = ((one.low, one.high, len(one.counts)) for one in (self, other))
        if here != there:
            raise self._unlike("(low, high, bins)", here, there)
        counts = [one + two for one, two in zip(self.counts, other.counts, strict=True)]
        return Histogram(low=self.low, high=self.high, counts=counts, outside=self.outside + other.outside)
