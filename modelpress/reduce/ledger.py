"""What is kept of each slice until all are there: one result per slice, however often the slice was tried.

Slices are numbered, and what a slice says carries the number, the attempt and the digest of what was cut: so a result
that comes twice, late, or of other data is known for what it is. Of several attempts the first counts, in any order.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic

from pydantic import Field, model_validator

from modelpress.errors import CorruptionError, CoverageError, StageError
from modelpress.reduce.kinds import AnyPartial
from modelpress.reduce.partials import Partial, PartialT
from modelpress.reports.base import Report

_SHOWN = 8


class Cut(Report):
    """How work was cut: its units (samples, batches, weights) dealt to slices."""

    of: str
    """Digest of what was cut."""
    slices: list[list[int]]
    """Numbers of each slice's units, rising; each unit is in one slice."""

    @model_validator(mode="after")
    def _check(self) -> Cut:
        units = sorted(unit for one in self.slices for unit in one)
        if units != list(range(len(units))) or not all(self.slices) or any(one != sorted(one) for one in self.slices):
            raise ValueError("each unit must be in one slice, slices must not be empty, and their units must rise")
        return self

    @property
    def units(self) -> int:
        """Of all slices."""
        return sum(map(len, self.slices))


def deal(of: str, units: int, slices: int, seed: int | None = None) -> Cut:
    """Cut work into slices whose numbers of units differ by one at most.

    Args:
        of: digest of the work.
        units: how many there are.
        slices: how many are wanted; no more than there are units are made.
        seed: None deals neighbours together. A number deals the units out at random, the same on every machine and in
            every version of Python: units of one kind, such as long texts in a sorted file, do not meet in one slice.

    Raises:
        ValueError: no units, or no slices.
    """
    if units < 1 or slices < 1:
        raise ValueError(f"{units} units cannot be dealt to {slices} slices")
    order = list(range(units))
    if seed is not None:
        order.sort(key=functools.partial(_shuffled, seed))
    slices = min(slices, units)
    ends = [units * part // slices for part in range(slices + 1)]
    return Cut(of=of, slices=[sorted(order[start:end]) for start, end in itertools.pairwise(ends)])


def deal_by_cost(of: str, costs: Sequence[float], slices: int, seed: int = 0) -> Cut:
    """Cut work into slices of like cost, the dearest slice first: handed out in order, they end at about one time.

    The dearest unit goes first, each to the slice that has cost least so far; no slice is dearer than 4/3 of the
    dearest of the best cut (Graham 1969, doi:10.1137/0117039, "longest processing time").

    Args:
        of: digest of the work.
        costs: of each unit, in any measure.
        slices: how many are wanted; no more than there are units are made.
        seed: deals units of one cost out at random, as in `deal`.

    Raises:
        ValueError: no units, no slices, or a cost that is negative or not finite.
    """
    if not costs or slices < 1:
        raise ValueError(f"{len(costs)} units cannot be dealt to {slices} slices")
    if not all(0 <= cost < math.inf for cost in costs):
        raise ValueError("costs must be finite, and 0 at least")
    dealt: list[list[int]] = [[] for _ in range(min(slices, len(costs)))]
    heap = [(0.0, 0, number) for number in range(len(dealt))]
    for unit in sorted(range(len(costs)), key=lambda unit: (-costs[unit], _shuffled(seed, unit))):
        cost, count, number = heap[0]
        heapq.heapreplace(heap, (cost + costs[unit], count + 1, number))
        dealt[number].append(unit)
    order = sorted(heap, key=lambda one: (-one[0], one[2]))
    return Cut(of=of, slices=[sorted(dealt[number]) for _, _, number in order])


def _shuffled(seed: int, unit: int) -> bytes:
    return hashlib.sha256(f"{seed}:{unit}".encode()).digest()


class Part(Report):
    """What a slice says."""

    of: str
    """Digest of what was cut."""
    slice: int = Field(ge=0)
    """Its number."""
    attempt: int = Field(ge=1)
    """Which attempt this is the result of."""
    value: AnyPartial
    """The result."""


@dataclass(frozen=True)
class Reduced(Generic[PartialT]):
    """What the slices that are there say together."""

    value: PartialT
    """Merged in the order of the slices."""
    slices: int
    """How many are in it."""
    of_slices: int
    """How many there are."""
    units: int
    """Units of those that are in it."""
    of_units: int
    """Units of all."""

    @property
    def coverage(self) -> float:
        """Share of the units that are in the value."""
        return self.units / self.of_units


class Ledger(Generic[PartialT]):
    """Results of slices, as they come; two ledgers of one cut can be joined.

    Args:
        cut: what there is to come.
        kind: the type of the results.
    """

    def __init__(self, cut: Cut, kind: type[PartialT]) -> None:
        self.cut, self._kind = cut, kind
        self._parts: dict[int, Part] = {}

    def add(self, part: Part) -> None:
        """Take a slice's result; one of an earlier attempt replaces it, one of a later attempt is not needed.

        Raises:
            StageError: it is of other work, of no slice, or of another type.
            CorruptionError: the same attempt says two different things.
        """
        doing = f"taking the result of slice {part.slice}, attempt {part.attempt}"
        if part.of != self.cut.of:
            raise StageError(doing, found=f"a slice of {part.of}", expected=f"one of {self.cut.of}")
        if part.slice >= len(self.cut.slices):
            raise StageError(doing, found=f"slice {part.slice}", expected=f"one of {len(self.cut.slices)}, from 0 on")
        if not isinstance(part.value, self._kind):
            raise StageError(doing, found=type(part.value).__name__, expected=self._kind.__name__)
        known = self._parts.get(part.slice)
        if known is not None and known.attempt == part.attempt and _canonical(known) != _canonical(part):
            raise CorruptionError(
                doing,
                found="two different results",
                expected="the same one however often it is sent",
                fix="number the attempts: a slice that is tried again has the next number",
            )
        if known is None or part.attempt < known.attempt:
            self._parts[part.slice] = part

    def join(self, other: Ledger[PartialT]) -> None:
        """Take all that another ledger has; see `add`."""
        for part in other._parts.values():
            self.add(part)

    @property
    def missing(self) -> list[int]:
        """Slices without a result."""
        return [number for number in range(len(self.cut.slices)) if number not in self._parts]

    def reduce(self, partial: bool = False) -> Reduced[PartialT]:
        """The results as one.

        Args:
            partial: take what is there; `Reduced.coverage` says how much that is.

        Raises:
            CoverageError: a slice has no result, or, with `partial`, none has.
        """
        missing = self.missing
        if (missing and not partial) or not self._parts:
            shown = ", ".join(map(str, missing[:_SHOWN])) + (", …" if len(missing) > _SHOWN else "")
            raise CoverageError(
                f"reducing {len(self.cut.slices)} slices to one {self._kind.__name__}",
                found=f"no result of slices {shown}",
                expected="one of each" if not partial else "one at least",
                fix="run these slices, or ask for a partial result, which says what it covers",
            )
        numbers = sorted(self._parts)
        return Reduced(
            value=merge_all(self._kind, [self._parts[number].value for number in numbers]),
            slices=len(numbers),
            of_slices=len(self.cut.slices),
            units=sum(len(self.cut.slices[number]) for number in numbers),
            of_units=self.cut.units,
        )


def merge_all(kind: type[PartialT], values: Iterable[Partial]) -> PartialT:
    """All of one type merged, from the first to the last.

    Raises:
        ValueError: there are none, or they do not fit together.
        TypeError: one is of another type.
    """
    some: Sequence[Partial] = list(values)
    for one in some:
        if not isinstance(one, kind):
            raise TypeError(f"{type(one).__name__} among {kind.__name__}")
    if not some:
        raise ValueError(f"no {kind.__name__} to merge")
    return functools.reduce(lambda one, two: one.merge(two), some)  # type: ignore[return-value]


def _canonical(part: Part) -> str:
    return json.dumps(part.model_dump(mode="json"), sort_keys=True)
