"""Tests that may be looked at after every observation: evidence that a rate is above a bound, or below it.

A fixed-sample test that is looked at each minute raises a false alarm sooner or later. What is computed here is an
*e-process*: a number that begins at 1 and, while the hypothesis holds, is expected never to be above 1 at any moment at
which one may stop to look. By Ville's inequality (1939) the chance that it *ever* reaches 1/alpha is at most alpha,
however often and for whatever reason it is looked at. So "alarm once the evidence is 1/alpha" has a false-alarm rate of
at most alpha for ever, and nothing has to be planned but the bound.

The process is the likelihood ratio of outcomes against the bound, averaged over a grid of alternatives (Robbins 1970,
doi:10.1214/aoms/1177696786: the mixture sequential probability ratio test). Against an alternative on the other side of
the bound the ratio is a supermartingale for every rate on the bound's side, so the hypothesis is one-sided and the rate
may drift within it. Outcomes need not be 0 or 1: for shares in [0, 1] the ratio lies under the linear bet of
Waudby-Smith & Ramdas (2024, doi:10.1093/jrsssb/qkad009) by the inequality of weighted means. A finite grid costs power
and never validity.

Evidence depends on counts alone, whatever the order. So counts of several servers, taken at any moments, just add up.
Only the standard library and numpy are imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Logs = npt.NDArray[np.float64]

SHIFTS: Logs = np.geomspace(0.1, 8.0, 33)
"""The alternatives: how far, in log odds, a rate lies beyond its bound. The steps are a seventh: between two of them
little power is lost; from the first, odds of 1.1 times the bound's, on."""
_BISECTIONS = 60
_LARGEST_LOGIT = 40.0


@dataclass(frozen=True)
class Counts:
    """Outcomes of one kind: how many, and the sum of them."""

    trials: float = 0
    """Number of outcomes."""
    hits: float = 0
    """Their sum; each lies in [0, 1]."""

    def __post_init__(self) -> None:
        if not (0 <= self.hits <= self.trials and math.isfinite(self.trials)):
            raise ValueError(f"{self.hits} hits of {self.trials} trials are no counts")

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.trials + other.trials, self.hits + other.hits)

    @property
    def rate(self) -> float | None:
        """Hits ÷ trials; None: no trials."""
        return self.hits / self.trials if self.trials else None


@dataclass(frozen=True)
class Arms:
    """What two models did with requests that a coin dealt between them."""

    share: float
    """Chance of each request to go to the candidate, in (0, 1), the same for all of them."""
    champion: Counts
    candidate: Counts


@dataclass(frozen=True)
class Evidence:
    """Natural logarithms of two e-processes."""

    above: float
    """That the bound is broken, against "it is kept"."""
    below: float
    """That the bound is kept, against "it is broken"."""

    def alarms(self, alpha: float) -> bool:
        """Whether the bound counts as broken, with a chance of at most `alpha` that it ever does while it is kept."""
        return self.above >= -math.log(alpha)

    def clears(self, beta: float) -> bool:
        """Whether the bound counts as kept, with a chance of at most `beta` that it ever does while it is broken."""
        return self.below >= -math.log(beta)


def rate(counts: Counts, bound: float) -> Evidence:
    """Evidence on one rate against a bound in (0, 1).

    Raises:
        ValueError: the bound is no rate between 0 and 1.
    """
    streams = [(counts, _logit(bound))]
    return Evidence(_mixture(streams, SHIFTS), _mixture(streams, -SHIFTS))


def excess(arms: Sequence[Arms], ratio: float, floor: float) -> Evidence:
    """Evidence on "the candidate's rate is at most `ratio` times the champion's, or at most `floor`".

    The two rates are compared on the hits alone. A coin with `share` dealt the requests, so where the candidate's rate
    is r times the champion's, a hit is the candidate's with odds r · share ÷ (1 − share), whatever the champion's rate
    is at that moment: what hits both alike, such as an overload, says nothing against the candidate. The bound counts
    as broken where the ratio *and* the floor are: the lesser evidence of the two; and as kept where the mean of the two
    evidences is large enough.

    Args:
        arms: one for each share that was in force, in any order.
        ratio: ≥ 1.
        floor: a rate in (0, 1) that is no harm, whatever the champion's is.

    Raises:
        ValueError: ratio, floor or a share is out of its range.
    """
    if not (ratio >= 1 and math.isfinite(ratio)):
        raise ValueError(f"the ratio of two rates must be 1 or more, not {ratio}")
    dealt = [_dealt(one, ratio) for one in arms]
    alone = rate(sum((one.candidate for one in arms), Counts()), floor)
    above = min(_mixture(dealt, SHIFTS), alone.above)
    below = float(np.logaddexp(_mixture(dealt, -SHIFTS), alone.below)) - math.log(2)
    return Evidence(above, below)


def interval(counts: Counts, alpha: float) -> tuple[float, float]:
    """The rates that the outcomes leave possible: a confidence sequence (Howard et al. 2021, doi:10.1214/20-AOS1991).

    The chance that the true rate *ever* lies outside, at any of all looks, is at most `alpha`.

    Args:
        counts: outcomes with one rate.
        alpha: in (0, 1).

    Returns:
        The lower and the upper end, in [0, 1].
    """
    limit = math.log(2 / alpha)
    low = _cross(lambda logit: _mixture([(counts, logit)], SHIFTS) >= limit)
    high = _cross(lambda logit: _mixture([(counts, logit)], -SHIFTS) < limit)
    return (0.0 if counts.hits == 0 else low), (1.0 if counts.hits == counts.trials else high)


def _dealt(arms: Arms, ratio: float) -> tuple[Counts, float]:
    """Hits as trials whose outcome is "the candidate's", and the log odds of it at the bound."""
    hits = Counts(arms.candidate.hits + arms.champion.hits, arms.candidate.hits)
    return hits, _logit(arms.share) + math.log(ratio)


def _mixture(streams: Iterable[tuple[Counts, float]], shifts: Logs) -> float:
    """Log of the mean, over the alternatives, of the likelihood ratio of all streams together.

    Args:
        streams: outcomes, and the log odds of their rate at the bound.
        shifts: of the alternatives, added to those; all of one sign.
    """
    total = np.zeros_like(shifts)
    for counts, logit in streams:
        total += counts.hits * shifts - counts.trials * (np.logaddexp(0, logit + shifts) - np.logaddexp(0, logit))
    return float(np.logaddexp.reduce(total)) - math.log(shifts.size)


def _cross(still: Callable[[float], bool]) -> float:
    """The rate at which a condition that holds for small ones ceases to; evidence is monotone in the bound."""
    low, high = -_LARGEST_LOGIT, _LARGEST_LOGIT
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if still(middle) else (low, middle)
    return 1 / (1 + math.exp(-(low + high) / 2))


def _logit(rate: float) -> float:
    if not 0 < rate < 1:
        raise ValueError(f"a rate to compare with must lie between 0 and 1, not {rate}")
    return math.log(rate / (1 - rate))
