"""How often the gate is wrong, and how often it knows: simulated pairs of models whose true difference is known.

Beside it are what others decide by: a threshold on the mean (MLflow's `MetricThreshold`), Wald's interval of the paired
difference, and "no significant difference" by McNemar's exact test. Then several comparisons joined: all must pass,
with and without a correction; something fails, with and without one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from statistics import NormalDist

import numpy as np
from scipy.stats import binomtest

from benchmarks._report import Row, main
from modelpress.config import GateConfig
from modelpress.scores import Scored, Scores
from registry.gates.comparisons import SOURCE, compare

MARGIN, CONFIDENCE, DISAGREE = 0.02, 0.95, 0.06
METRICS = 5
Judge = Callable[[Scores, Scores], str]
Z = NormalDist().inv_cdf(CONFIDENCE)


def measure(quick: bool) -> Iterable[Row]:
    """Rows of one comparison, and of several."""
    trials = 300 if quick else 5_000
    for samples in (200, 1_000, 4_000):
        yield from _one(samples, trials)
    yield from _joined(1_000, trials if quick else 2_000)


def _one(samples: int, trials: int) -> Iterator[Row]:
    judges: dict[str, Judge] = {
        "modelpress": _gate,
        "Wald's interval": _wald,
        "threshold on the mean": _threshold,
        "no significant difference": _mcnemar,
    }
    case = f"one accuracy, {samples} samples, margin {MARGIN:g}, {DISAGREE:.0%} of the answers differ"
    for loss, kind, wrong in ((MARGIN, "at the margin", "pass"), (0.0, "equal", "fail")):
        generator = np.random.default_rng(samples)
        drawn = [_pair(generator, loss, samples) for _ in range(trials)]
        for system, judge in judges.items():
            verdicts = [judge(*pair) for pair in drawn]
            yield Row(case, system, f"{kind}: wrongly {wrong}", "%", 100 * verdicts.count(wrong) / trials)
            if loss == 0:
                yield Row(case, system, "equal: rightly pass", "%", 100 * verdicts.count("pass") / trials)


def _joined(samples: int, trials: int) -> Iterator[Row]:
    """Metrics that do not hang together, which is where joining them goes most wrong."""
    case = f"{METRICS} metrics together, {samples} samples"
    alone = _config(CONFIDENCE)
    strict = _config(1 - (1 - CONFIDENCE) / METRICS)
    for losses, kind in (((MARGIN,) * METRICS, "all at the margin"), ((0.0,) * METRICS, "all equal")):
        generator = np.random.default_rng(METRICS)
        drawn = [[_pair(generator, loss, samples) for loss in losses] for _ in range(trials)]
        ours = [_verdicts(_together(pairs), _config(CONFIDENCE, METRICS)) for pairs in drawn]
        each = [[_single(pair, alone) for pair in pairs] for pairs in drawn]
        corrected = [[_single(pair, strict) for pair in pairs] for pairs in drawn]
        for system, found in (("modelpress", ours), ("no correction", each), ("Bonferroni for all", corrected)):
            passed = sum(set(verdicts) == {"pass"} for verdicts in found)
            failed = sum("fail" in verdicts for verdicts in found)
            yield Row(case, system, f"{kind}: pass", "%", 100 * passed / trials)
            yield Row(case, system, f"{kind}: fail", "%", 100 * failed / trials)


def _pair(generator: np.random.Generator, loss: float, samples: int) -> tuple[Scores, Scores]:
    """0/1 scores of a candidate and a reference whose true difference is −loss."""
    kinds = generator.choice(3, samples, p=[(DISAGREE - loss) / 2, (DISAGREE + loss) / 2, 1 - DISAGREE])
    return (kinds != 1).astype(float), (kinds != 0).astype(float)


def _config(confidence: float, metrics: int = 1) -> GateConfig:
    further = {f"metric {number}": MARGIN for number in range(1, metrics)}
    return GateConfig(margin=MARGIN, confidence=confidence, further_margins=further)


def _together(pairs: list[tuple[Scores, Scores]]) -> tuple[Scored, Scored]:
    candidate, source = (Scored(pairs[0][side], "these", "metric 0") for side in (0, 1))
    further = [{f"metric {number}": pair[side] for number, pair in enumerate(pairs) if number} for side in (0, 1)]
    return replace(candidate, further=further[0]), replace(source, further=further[1])


def _verdicts(pair: tuple[Scored, Scored], config: GateConfig) -> list[str]:
    return [check.verdict for check in compare(pair[0], [(SOURCE, pair[1])], config)]


def _single(pair: tuple[Scores, Scores], config: GateConfig) -> str:
    return _verdicts((Scored(pair[0], "these", "accuracy"), Scored(pair[1], "these", "accuracy")), config)[0]


def _gate(candidate: Scores, source: Scores) -> str:
    return _single((candidate, source), _config(CONFIDENCE))


def _wald(candidate: Scores, source: Scores) -> str:
    differences = candidate - source
    half = Z * float(differences.std()) / math.sqrt(differences.size)
    low, high = differences.mean() - half, differences.mean() + half
    return "pass" if low > -MARGIN else "fail" if high < -MARGIN else "inconclusive"


def _threshold(candidate: Scores, source: Scores) -> str:
    return "pass" if candidate.mean() - source.mean() > -MARGIN else "fail"


def _mcnemar(candidate: Scores, source: Scores) -> str:
    """Passes what is not significantly worse: the fewer samples, the easier."""
    gained, lost = int((candidate > source).sum()), int((candidate < source).sum())
    p = binomtest(lost, gained + lost, 0.5, alternative="greater").pvalue if gained + lost else 1.0
    return "fail" if p < 1 - CONFIDENCE else "pass"


if __name__ == "__main__":
    main(
        "gate",
        measure,
        note=f"Shares of simulated decisions; at {CONFIDENCE:.0%} confidence at most {1 - CONFIDENCE:.0%} may be "
        "wrong. A candidate at the margin neither passes nor fails: all verdicts but inconclusive are wrong there.\n",
    )
