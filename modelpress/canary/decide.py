"""What follows from the state of a canary and from what was seen: pure arithmetic, without a store or a clock.

Three tests run side by side, each on all that was seen since the canary began (`modelpress.sequential`):

==============  ======================================================================================================
errors          the candidate's rate against the champion's, on requests that a coin dealt between them
latency         the same, of answers that took longer than what is slow
disagreement    the share of mirrored samples on which the two disagree, against a bound
==============  ======================================================================================================

Each says *alarm*, *clear* or *open*. The chance that any of them ever raises a false alarm is at most `alpha`: half of
it is the controller's, over all servers' counts, shared between the tests; the other half is shared between the
servers, each of which tests its own counts and stops at once. A candidate that breaks a bound passes that bound's test
with a chance of at most `beta`; it takes a pass of all to take over, so `beta` is not shared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from modelpress import sequential
from modelpress.canary.log import CanaryState
from modelpress.canary.tally import Tallies
from modelpress.config import CanaryConfig
from modelpress.reports import Report
from modelpress.sequential import Arms, Counts, Evidence

Test = Literal["errors", "latency", "disagreement"]
Verdict = Literal["alarm", "clear", "open"]
Kind = Literal["wait", "step", "promote", "rollback"]


class Finding(Report):
    """How one test stands."""

    test: Test
    """Which."""
    verdict: Verdict
    """`alarm`: the bound is broken. `clear`: it is kept. `open`: neither is shown."""
    evidence: float
    """Natural logarithm of the evidence that the bound is broken; an alarm from `alarm_at` on."""
    evidence_kept: float
    """The same, that it is kept; clear from `clear_at` on."""
    alarm_at: float
    """ln(1 ÷ this test's share of alpha)."""
    clear_at: float
    """ln(1 ÷ beta)."""
    requests: float
    """Outcomes of the candidate that were looked at."""
    rate: float | None = None
    """The candidate's rate; None: nothing was seen."""
    low: float = 0.0
    """Lower end of what the rate may be, at all looks together, at this test's share of alpha."""
    high: float = 1.0
    """Upper end."""
    champion_rate: float | None = None
    """The champion's, where the two are compared."""
    bound: str
    """What is asked, for people."""

    def line(self) -> str:
        """In one line, for logs."""
        rate = "nothing seen" if self.rate is None else f"{self.rate:.4f} [{self.low:.4f}, {self.high:.4f}]"
        beside = "" if self.champion_rate is None else f", champion {self.champion_rate:.4f}"
        return f"{self.test}: {self.verdict}, {rate} of {self.requests:g}{beside}; {self.bound}"


@dataclass(frozen=True)
class Action:
    """What is to be done, why, and how the tests stand."""

    kind: Kind
    reasons: list[str]
    findings: list[Finding]


def tests(config: CanaryConfig) -> list[Test]:
    """The tests that a canary's steps make possible."""
    modes = {step.mode for step in config.steps}
    compared: list[Test] = ["errors", "latency"] if "canary" in modes else []
    mirrored: list[Test] = ["disagreement"] if "shadow" in modes else []
    return compared + mirrored


def levels(config: CanaryConfig) -> tuple[float, float]:
    """Each test's share of alpha: the controller's, and that of one server."""
    central = config.alpha / 2 / len(tests(config))
    return central, central / config.servers


def findings(config: CanaryConfig, seen: Tallies, alpha: float) -> list[Finding]:
    """How every test stands.

    Args:
        config: steps and bounds.
        seen: all servers' counts, or one server's.
        alpha: each test's share.
    """
    return [_finding(test, config, seen, alpha) for test in tests(config)]


def alarm(test: Test, config: CanaryConfig, seen: Tallies, alpha: float) -> Finding | None:
    """How a test stands that raises an alarm; None while it does not. Cheap where it does not: servers ask at each hit.

    Args:
        test: which.
        config, seen, alpha: see `findings`.
    """
    return _finding(test, config, seen, alpha) if _evidence(test, config, seen).alarms(alpha) else None


def advance(state: CanaryState, seen: Tallies, elapsed_seconds: float) -> Action:
    """What to do with a canary that runs.

    Args:
        state: of the canary.
        seen: all servers' counts.
        elapsed_seconds: since the step began, by one clock; below 0 counts as 0.
    """
    config = state.config
    found = findings(config, seen, levels(config)[0])
    alarms = [one.line() for one in found if one.verdict == "alarm"]
    if seen.stopped or alarms:
        return Action("rollback", [*seen.stopped, *alarms], found)
    lacking = _lacking(state, seen, found, max(0.0, elapsed_seconds))
    if not lacking:
        kept = [one.line() for one in found]
        return Action("promote" if state.is_last else "step", kept, found)
    if elapsed_seconds > config.max_step_seconds:
        why = f"step {state.step + 1} is inconclusive after {elapsed_seconds:.0f} s"
        return Action("rollback", [why, *lacking], found)
    return Action("wait", lacking, found)


def _lacking(state: CanaryState, seen: Tallies, found: list[Finding], elapsed: float) -> list[str]:
    """What the step still waits for."""
    config, step = state.config, state.now
    lacking = [*seen.damaged]
    if seen.servers > config.servers:
        lacking.append(
            f"{seen.servers} servers take part, and alpha is shared between {config.servers}: raise `servers`"
        )
    if (ran := seen.of(state.step).ran) < step.min_requests:
        lacking.append(f"{ran} of {step.min_requests} requests in step {state.step + 1}")
    if elapsed < step.hold_seconds:
        lacking.append(f"{elapsed:.0f} of {step.hold_seconds:g} seconds in step {state.step + 1}")
    if state.is_last and config.require_clear:
        lacking += [f"not shown yet: {one.line()}" for one in found if one.verdict != "clear"]
    return lacking


def _evidence(test: Test, config: CanaryConfig, seen: Tallies) -> Evidence:
    if test == "disagreement":
        return sequential.rate(_disagreement(seen), config.max_disagreement)
    return sequential.excess(_arms(test, config, seen), *_bounds(test, config))


def _finding(test: Test, config: CanaryConfig, seen: Tallies, alpha: float) -> Finding:
    evidence = _evidence(test, config, seen)
    if test == "disagreement":
        counts, champion = _disagreement(seen), None
        bound = f"at most {config.max_disagreement:g} of the samples"
    else:
        arms, (ratio, floor) = _arms(test, config, seen), _bounds(test, config)
        counts = sum((one.candidate for one in arms), Counts())
        champion = sum((one.champion for one in arms), Counts()).rate
        bound = f"at most {ratio:g} times the champion's, or {floor:g}"
    low, high = sequential.interval(counts, alpha)
    return Finding(
        test=test,
        verdict=_verdict(evidence, alpha, config.beta),
        evidence=evidence.above,
        evidence_kept=evidence.below,
        alarm_at=-math.log(alpha),
        clear_at=-math.log(config.beta),
        requests=counts.trials,
        rate=counts.rate,
        low=low,
        high=high,
        champion_rate=champion,
        bound=bound,
    )


def _disagreement(seen: Tallies) -> Counts:
    return sum((one.disagreement_counts for one in seen.steps.values()), Counts())


def _bounds(test: Test, config: CanaryConfig) -> tuple[float, float]:
    if test == "errors":
        return config.max_error_ratio, config.error_floor
    return config.max_slow_ratio, config.slow_floor


def _arms(test: Test, config: CanaryConfig, seen: Tallies) -> list[Arms]:
    """Both models' counts of each step that dealt requests between them."""
    found = []
    for index, tally in sorted(seen.steps.items()):
        if index >= len(config.steps) or config.steps[index].mode != "canary":
            continue
        both = (tally.champion, tally.candidate)
        champion, candidate = (one.error_counts if test == "errors" else one.slow_counts for one in both)
        found.append(Arms(config.steps[index].share, champion, candidate))
    return found


def _verdict(evidence: Evidence, alpha: float, beta: float) -> Verdict:
    return "alarm" if evidence.alarms(alpha) else "clear" if evidence.clears(beta) else "open"
