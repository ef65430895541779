"""Tests that are looked at all the time: false alarms, and how long a bad candidate stays.

`python -m benchmarks.sequential [--quick]`. Simulated requests, dealt by a coin and looked at every 100, up to 50,000
of them in 1,000 repetitions (quick: 10,000 in 100), at the shares of alpha that a canary with its default config has.
In the same run, on the same requests, the test that is usually taken: a z-test of two proportions, at the same alpha,
at every look. Where a candidate keeps its bounds, the share that is ever stopped is the false-alarm rate; where it
breaks one, what counts is how many requests of the candidate that takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from benchmarks._report import Row, main
from modelpress import sequential
from modelpress.canary import decide
from modelpress.config import CanaryConfig
from modelpress.sequential import Arms, Counts

CONFIG = CanaryConfig()
ALPHA = decide.levels(CONFIG)[0]
EVERY = 100
NOTE = (
    f"Each test at its share of alpha, {ALPHA:.4g}: half of {CONFIG.alpha:g}, by three. `ever stopped` is the share of "
    "repetitions with an alarm at any look; where the bound is kept, it must not be more than alpha. Requests are "
    "those that the candidate ran until the alarm (or until it was clear), of the repetitions in which that came.\n"
)


@dataclass(frozen=True)
class Case:
    """A candidate and a champion."""

    name: str
    share: float
    champion: float
    """Its rate of errors."""
    candidate: float
    outage: bool = False
    """A fifth of the time, half of all requests fail, whoever answers."""


CASES = [
    Case("equal, errors 1 %, share 0.05", 0.05, 0.01, 0.01),
    Case("equal, errors 1 %, share 0.5", 0.5, 0.01, 0.01),
    Case("at the bound, 6 % to 4 %, share 0.5", 0.5, 0.04, 0.06),
    Case("equal, with an outage for both, share 0.25", 0.25, 0.01, 0.01, outage=True),
    Case("3 % to 1 %, share 0.25", 0.25, 0.01, 0.03),
    Case("5 % to 1 %, share 0.05", 0.05, 0.01, 0.05),
    Case("5 % to 1 %, share 0.5", 0.5, 0.01, 0.05),
    Case("20 % to 1 %, share 0.05", 0.05, 0.01, 0.2),
    Case("100 % to 0 %, share 0.05", 0.05, 0.0, 1.0),
]
RATES = [(0.05, 0.05), (0.01, 0.05), (0.1, 0.05), (0.2, 0.05), (0.5, 0.05)]
"""Disagreement, and its bound."""


@dataclass(frozen=True)
class Course:
    """What was counted at each look: (repetitions, looks) each."""

    champion: np.ndarray
    champion_hits: np.ndarray
    candidate: np.ndarray
    candidate_hits: np.ndarray

    def arms(self, row: int, look: int, share: float) -> Arms:
        """One repetition at one look."""
        at = row, look
        champion = Counts(int(self.champion[at]), int(self.champion_hits[at]))
        return Arms(share, champion, Counts(int(self.candidate[at]), int(self.candidate_hits[at])))


def course(case: Case, repetitions: int, looks: int, seed: int) -> Course:
    """Simulated requests."""
    generator = np.random.default_rng(seed)
    size = repetitions, looks
    dealt = generator.binomial(EVERY, case.share, size)
    rates = []
    for rate in (case.champion, case.candidate):
        over_time = np.full(looks, rate)
        if case.outage:
            over_time[looks // 5 : 2 * looks // 5] = 0.5
        rates.append(over_time)
    hits = [generator.binomial(count, rate) for count, rate in zip((EVERY - dealt, dealt), rates, strict=True)]
    return Course(*(np.cumsum(one, axis=1) for one in (EVERY - dealt, hits[0], dealt, hits[1])))


def firsts(found: Course, share: float, reached: Callable[[Arms], bool]) -> tuple[float, list[int]]:
    """Share of repetitions in which something is ever reached, and the candidate's requests until then."""
    repetitions, looks = found.candidate.shape
    when = []
    for row in range(repetitions):
        for look in range(looks):
            if reached(found.arms(row, look, share)):
                when.append(int(found.candidate[row, look]))
                break
    return len(when) / repetitions, when


def z_test(arms: Arms) -> bool:
    """That the candidate's rate is above `max_error_ratio` times the champion's, by normal approximation, as if there
    were one look."""
    one, two, ratio = arms.candidate, arms.champion, CONFIG.max_error_ratio
    if one.trials < 30 or two.trials < 30:
        return False
    excess = one.hits / one.trials - max(ratio * two.hits / two.trials, CONFIG.error_floor)
    pooled = (one.hits + two.hits) / (one.trials + two.trials)
    deviation = math.sqrt(max(pooled * (1 - pooled), 1e-12) * (1 / one.trials + ratio**2 / two.trials))
    return excess / deviation > NormalDist().inv_cdf(1 - ALPHA)


def alarmed(arms: Arms) -> bool:
    return sequential.excess([arms], CONFIG.max_error_ratio, CONFIG.error_floor).alarms(ALPHA)


def cleared(arms: Arms) -> bool:
    return sequential.excess([arms], CONFIG.max_error_ratio, CONFIG.error_floor).clears(CONFIG.beta)


def rows_of(case: str, system: str, ever: float, when: list[int], what: str = "ever stopped") -> Iterator[Row]:
    yield Row(case, system, what, "1", ever)
    yield Row(case, system, "requests, median", "", float(np.median(when)) if when else None)
    yield Row(case, system, "requests, 95 % of them", "", float(np.quantile(when, 0.95)) if when else None)


def measure(quick: bool) -> Iterator[Row]:
    repetitions, looks = (100, 100) if quick else (1_000, 500)
    for seed, case in enumerate(CASES):
        found = course(case, repetitions, looks, seed)
        for system, reached in (("modelpress", alarmed), ("z-test at every look", z_test)):
            yield from rows_of(case.name, system, *firsts(found, case.share, reached))
        if case.candidate <= case.champion:
            yield from rows_of(case.name, "modelpress, clear", *firsts(found, case.share, cleared), "ever clear")
    for seed, (rate, bound) in enumerate(RATES, len(CASES)):
        name = f"disagreement {rate:.0%}, bound {bound:.0%}"
        found = course(Case(name, 0.999, 0.0, rate), repetitions, looks, seed)

        def above(arms: Arms, bound: float = bound) -> bool:
            return sequential.rate(arms.candidate, bound).alarms(ALPHA)

        def below(arms: Arms, bound: float = bound) -> bool:
            return sequential.rate(arms.candidate, bound).clears(CONFIG.beta)

        yield from rows_of(name, "modelpress", *firsts(found, 0.999, above))
        if rate <= bound:
            yield from rows_of(name, "modelpress, clear", *firsts(found, 0.999, below), "ever clear")


if __name__ == "__main__":
    main("sequential", measure, note=NOTE)
