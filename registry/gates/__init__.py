"""The gate: who may become champion. Pure arithmetic on numbers that others measured.

`evidence` is all that it looks at, `comparisons` tests quality sample by sample, `reasons` asks why it answers so,
`conditions` holds the other numbers to their bounds, and `judgement` joins the checks into a `Decision`.
"""

from modelpress.reports import Check, Decision, Override, Verdict
from modelpress.scores import UNMEASURED, Scored, Scores
from registry.gates.evidence import Evidence, Figures, Origin, Published
from registry.gates.judgement import (
    APPROVAL,
    BINDING,
    Approval,
    decide,
    fingerprint,
    recheck,
    waits,
    with_approval,
    with_override,
)

__all__ = [
    "APPROVAL",
    "BINDING",
    "UNMEASURED",
    "Approval",
    "Check",
    "Decision",
    "Evidence",
    "Figures",
    "Origin",
    "Override",
    "Published",
    "Scored",
    "Scores",
    "Verdict",
    "decide",
    "fingerprint",
    "recheck",
    "waits",
    "with_approval",
    "with_override",
]
