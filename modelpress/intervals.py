"""Confidence intervals of a mean score and of a paired difference: what "no worse" means, with numbers.

Scores of 0 and 1 (a sample is right or wrong) take score intervals, which hold their level where nearly everything is
right and where two models hardly ever disagree; other scores take a bias-corrected accelerated bootstrap with a fixed
seed, so that the same scores always give the same interval. Every `confidence` here is two-sided: a one-sided test at
level c looks at one end of the interval with confidence 2c − 1. Only the standard library and numpy are imported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]

RESAMPLES = 4_000
ENOUGH_DIFFERENCES = 30
"""Distinct ones, to know their scale by."""
_RESAMPLED_AT_ONCE = 2**21
_BISECTIONS = 60


@dataclass(frozen=True)
class Interval:
    """An estimate between the ends of its confidence interval."""

    value: float
    low: float
    high: float


def wilson(successes: int, samples: int, confidence: float) -> Interval:
    """Score interval of a share (Wilson 1927, doi:10.1080/01621459.1927.10502953).

    Raises:
        ValueError: no samples, or more successes than samples.
    """
    if not 0 <= successes <= samples or samples == 0:
        raise ValueError(f"{successes} successes of {samples} samples is no share")
    z2 = _quantile(confidence) ** 2
    share = successes / samples
    centre = (share + z2 / (2 * samples)) / (1 + z2 / samples)
    half = math.sqrt(z2 * (share * (1 - share) / samples + z2 / (4 * samples**2))) / (1 + z2 / samples)
    return Interval(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


def tango(gained: int, lost: int, samples: int, confidence: float) -> Interval:
    """Score interval of the difference of two paired shares (Tango 1998, Statistics in Medicine 17:891–908, eq. 6–9).

    Args:
        gained: samples that the first is right on and the second wrong.
        lost: samples that the first is wrong on and the second right.
        samples: all samples, the concordant ones included.
        confidence: two-sided.

    Raises:
        ValueError: no samples, or more discordant ones than samples.
    """
    if gained < 0 or lost < 0 or gained + lost > samples or samples == 0:
        raise ValueError(f"{gained} gained and {lost} lost of {samples} samples is no paired table")
    z = _quantile(confidence)
    value = (gained - lost) / samples

    def solve(inside: float, outside: float) -> float:
        for _ in range(_BISECTIONS):
            middle = (inside + outside) / 2
            if abs(_tango_statistic(middle, gained, lost, samples)) <= z:
                inside = middle
            else:
                outside = middle
        return (inside + outside) / 2

    return Interval(value, solve(value, -1.0), solve(value, 1.0))


def _tango_statistic(delta: float, gained: int, lost: int, samples: int) -> float:
    """Score statistic of "the difference is delta"; falls as delta rises."""
    distance = gained - lost - samples * delta
    if distance == 0:
        return 0.0
    # Maximum-likelihood share of `lost` under the hypothesis: the larger root of a·q² + b·q + c.
    a = 2 * samples
    b = -gained - lost + (2 * samples - gained + lost) * delta
    c = -lost * delta * (1 - delta)
    share = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = samples * (2 * share + delta * (1 - delta))
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)


def bootstrap_mean(values: Scores, confidence: float, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Bias-corrected accelerated bootstrap of a mean (Efron 1987, doi:10.1080/01621459.1987.10478410).

    Args:
        values: (samples,), float64.
        confidence: two-sided.
        resamples: bootstrap samples.
        seed: of the resampling.

    Raises:
        ValueError: no samples.
    """
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"a mean needs a non-empty vector, not shape {values.shape}")
    value = float(values.mean())
    centred = values - value
    largest = float(np.abs(centred).max())
    if largest == 0:
        return Interval(value, value, value)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _RESAMPLED_AT_ONCE // values.size)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        picks = generator.integers(0, values.size, size=(count, values.size), dtype=np.int32)
        means[start : start + count] = values[picks].mean(axis=1)
    normal = NormalDist()
    # Ties with the estimate count half: scores take few values, and few of them differ between two models.
    below = (np.count_nonzero(means < value) + 0.5 * np.count_nonzero(means == value)) / resamples
    bias = normal.inv_cdf(min(max(below, 0.5 / resamples), 1 - 0.5 / resamples))
    # The jackknife's acceleration has a closed form for a mean. It has no unit: so powers of tiny numbers stay numbers.
    unit = centred / largest
    acceleration = float((unit**3).sum()) / (6 * float((unit**2).sum()) ** 1.5)
    ends = []
    for tail in ((1 - confidence) / 2, (1 + confidence) / 2):
        shifted = bias + normal.inv_cdf(tail)
        ends.append(normal.cdf(bias + shifted / (1 - acceleration * shifted)))
    low, high = np.quantile(means, ends)
    return Interval(value, min(value, float(low)), max(value, float(high)))


def mean(scores: Scores, confidence: float) -> Interval:
    """Interval of the mean of per-sample scores: `wilson` for 0/1 scores, `bootstrap_mean` for others.

    The latter is never narrower than if the share of samples that as many equal ones leave open (`wilson`) scored the
    least or the most that the metric gives (see `_range`): few samples, or equal ones, are no certainty.

    Args:
        scores: (samples,), float64.
        confidence: two-sided.

    Raises:
        ValueError: no samples, or a score that is not finite.
    """
    scores = _checked(scores)
    if _is_binary(scores):
        return wilson(int(scores.sum()), scores.size, confidence)
    found = bootstrap_mean(scores, confidence)
    unseen = wilson(0, scores.size, confidence).high
    least, most = _range(scores)
    low, high = found.value - unseen * (found.value - least), found.value + unseen * (most - found.value)
    return Interval(found.value, min(found.low, low), max(found.high, high))


def paired_difference(scores: Scores, baseline: Scores, confidence: float) -> Interval:
    """Interval of mean(scores) − mean(baseline) over the same samples, in the same order.

    0/1 scores take `tango`. Others take `bootstrap_mean` of the differences, never narrower than what the same number
    of samples without one disagreement would leave open on the metric's range (see `_range`): a bootstrap of
    differences that are nearly all equal, or of a single one, would otherwise be sure of what it never saw. Where
    `ENOUGH_DIFFERENCES` are there and most samples differ, the range is that of the differences: they show their scale.

    Args:
        scores: (samples,), float64.
        baseline: (samples,), float64.
        confidence: two-sided.

    Raises:
        ValueError: no samples, not as many scores as baseline scores, or a score that is not finite.
    """
    scores, baseline = _checked(scores), _checked(baseline)
    if scores.shape != baseline.shape:
        raise ValueError(f"{scores.size} scores cannot be paired with {baseline.size} of the baseline")
    if _is_binary(scores) and _is_binary(baseline):
        gained = int(np.count_nonzero(scores > baseline))
        lost = int(np.count_nonzero(scores < baseline))
        return tango(gained, lost, scores.size, confidence)
    differences = scores - baseline
    found = bootstrap_mean(differences, confidence)
    changed = differences[differences != 0]
    if 2 * changed.size > differences.size and np.unique(changed).size >= ENOUGH_DIFFERENCES:
        least, most = float(differences.min()), float(differences.max())
    else:
        least, most = _range(np.concatenate([scores, baseline]))
    unseen = tango(0, 0, scores.size, confidence).high * (most - least)
    return Interval(found.value, min(found.low, found.value - unseen), max(found.high, found.value + unseen))


def difference(scores: Scores, baseline: Scores, confidence: float) -> Interval:
    """Interval of mean(scores) − mean(baseline) where the two were measured on different samples.

    The two `mean` intervals are joined as Newcombe's hybrid score interval is (1998, Statistics in Medicine 17:873–890,
    method 10). It is wider than `paired_difference`: what samples differ in does not cancel.

    Args:
        scores: (samples,), float64.
        baseline: (other samples,), float64.
        confidence: two-sided.

    Raises:
        ValueError: no samples, or a score that is not finite.
    """
    one, two = mean(scores, confidence), mean(baseline, confidence)
    value = one.value - two.value
    return Interval(
        value,
        value - math.hypot(one.value - one.low, two.high - two.value),
        value + math.hypot(one.high - one.value, two.value - two.low),
    )


def rescaled(found: Interval, measured: float, confidence: float) -> Interval:
    """About the interval that another confidence would have given, where the scores are not at hand any more.

    Each half is stretched by the ratio of the normal distribution's quantiles. That is exact for Wald's interval and an
    approximation for a bootstrap of a mean, which is normal in the limit.

    Args:
        found: an interval.
        measured: its confidence, two-sided.
        confidence: the one that is wanted, two-sided.
    """
    ratio = _quantile(confidence) / _quantile(measured)
    return Interval(
        found.value, found.value - ratio * (found.value - found.low), found.value + ratio * (found.high - found.value)
    )


def needed_samples(deviation: float, margin: float, confidence: float, power: float = 0.8) -> int:
    """Paired samples after which a true difference of zero is told from a loss of `margin`.

    n = ((z_confidence + z_power) · deviation ÷ margin)², the normal approximation.

    Args:
        deviation: standard deviation of the paired differences; √(share of discordant answers) for 0/1 scores.
        margin: the loss that matters, in the same units.
        confidence: two-sided, of the interval whose end is compared with the margin.
        power: chance of seeing it.
    """
    z = _quantile(confidence) + NormalDist().inv_cdf(power)
    return max(1, math.ceil((z * deviation / margin) ** 2))


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _checked(scores: Scores) -> Scores:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 1 or scores.size == 0:
        raise ValueError(f"scores must be a non-empty vector, not shape {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(scores))} of {scores.size} scores are not finite")
    return scores


def _range(scores: Scores) -> tuple[float, float]:
    """Least and largest score that the metric can give: 0 and 1, or what was seen where that lies beyond."""
    return min(0.0, float(scores.min())), max(1.0, float(scores.max()))


def _is_binary(scores: Scores) -> bool:
    return bool(((scores == 0) | (scores == 1)).all())
