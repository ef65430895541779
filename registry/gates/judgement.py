"""From checks to a decision, and what a person adds to it: approval, or an override."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from modelpress.config import GateConfig
from modelpress.reports import Check, Decision, Override, Report, Verdict
from modelpress.scores import Scored
from registry.gates.comparisons import CHAMPION, PUBLICATION, SOURCE, compare
from registry.gates.conditions import PUBLISHED, SIGNATURE, conditions
from registry.gates.evidence import Evidence
from registry.gates.reasons import reasons

APPROVAL = "approval"
"""Name of the check that a person answers."""
BINDING = frozenset({PUBLISHED, SIGNATURE, APPROVAL})
"""Checks that no override holds against: that what was judged is what is published, and the word of a second person."""


class Approval(Report):
    """What a person answered."""

    approved: bool
    """Yes or no."""
    by: str
    """The name that was given."""
    reason: str
    """Why."""
    at: str
    """When, UTC."""
    of: str
    """`fingerprint` of the decision that was shown: an answer holds for no other."""


def decide(evidence: Evidence, config: GateConfig) -> Decision:
    """Judge a candidate against the source model, the champion if there is one, and the bounds of the config."""
    references = [(SOURCE, evidence.source)]
    if evidence.champion is not None:
        references.append((CHAMPION, evidence.champion))
    quality = compare(evidence.candidate, references, config, beside=list(reasons(evidence, config)))
    return _conclude([*quality, *conditions(evidence, config)])


def recheck(found: Scored, published: Mapping[str, Scored], config: GateConfig) -> Decision:
    """Judge a pack that is published already, by scores that were measured now.

    Args:
        found: today's scores of the published bytes.
        published: what the pack was published with, `source` and `candidate`.
        config: of the gate; its bounds on size, speed and reasons say nothing that could have changed.

    Returns:
        The decision; `promote` says whether it may stay.
    """
    missing = Scored(None, samples=found.samples, metric=found.metric)
    references = [(who, published.get(key, missing)) for who, key in ((SOURCE, "source"), (PUBLICATION, "candidate"))]
    return _conclude(compare(found, references, config, unpaired=True))


def fingerprint(pack: str, decision: Decision) -> str:
    """Names what a person is shown: the pack, all checks but their own, with the numbers, and who overrides what."""
    shown = [reason for check, reason in zip(decision.checks, decision.reasons, strict=True) if check.name != APPROVAL]
    against = [decision.override.line()] if decision.override else []
    return hashlib.sha256("\n".join([pack, *shown, *against]).encode()).hexdigest()[:16]


def with_override(decision: Decision, override: Override | None) -> Decision:
    """A decision that did not pass, and the word of a person who takes it upon themselves; see `BINDING`.

    One that passed stays as it is: there is nothing to override, and nobody is named for it.
    """
    return _conclude(decision.checks, override) if override is not None else decision


def with_approval(pack: str, decision: Decision, approval: Approval | None, config: GateConfig) -> Decision:
    """A decision to promote, and what a person said of this very one; any other is shown to nobody."""
    if not decision.promote:
        return decision
    if approval is None or approval.of != fingerprint(pack, decision):
        check = Check(name=APPROVAL, verdict="inconclusive", reason="a person must agree, and nobody has answered")
    else:
        answer = f"{'yes' if approval.approved else 'no'} by {approval.by} at {approval.at}: {approval.reason}"
        check = Check(name=APPROVAL, verdict="pass" if approval.approved else "fail", reason=answer)
    asked = _conclude([*decision.checks, check], decision.override)
    return asked.model_copy(update={"wait_hours": config.approval_hours})


def waits(decision: Decision) -> bool:
    """Whether nothing but a person's answer is missing."""
    return any(check.name == APPROVAL and check.verdict == "inconclusive" for check in decision.checks)


def _conclude(checks: list[Check], override: Override | None = None) -> Decision:
    unmet = [check for check in checks if check.verdict != "pass"]
    verdicts = {check.verdict for check in unmet}
    verdict: Verdict = "fail" if "fail" in verdicts else "inconclusive" if verdicts else "pass"
    needed = [check.required_samples for check in checks if check.required_samples is not None]
    holds = override is not None and not any(check.name in BINDING for check in unmet)
    return Decision(
        promote=not unmet or holds,
        verdict=verdict,
        reasons=[f"{check.name}: {check.verdict}, {check.reason}" for check in checks],
        required_samples=max(needed, default=None),
        checks=checks,
        override=override if unmet else None,
    )
