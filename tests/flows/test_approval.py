"""What a person is shown before they answer."""

from __future__ import annotations

from flows.approval import describe
from modelpress.reports import Check, Decision, Override

CHECKS = [
    Check(name="quality against the source", verdict="pass", reason="0.9 | 0.9"),
    Check(name="compression ratio", verdict="fail", reason="1.00×, at least 4× is asked"),
    Check(name="approval", verdict="inconclusive", reason="a person must agree, and nobody has answered"),
]
WAITING = Decision(promote=False, verdict="fail", reasons=[check.reason for check in CHECKS], checks=CHECKS)


def test_the_form_shows_each_check_in_a_row_of_its_own() -> None:
    rows = describe("demo", "a" * 64, WAITING).splitlines()
    assert [row.split(" | ")[0] for row in rows[4:]] == [f"| {check.name}" for check in CHECKS]
    assert r"0.9 \| 0.9 |" in rows[4]
    assert "overridden" not in rows[0]


def test_the_form_shows_who_overrides_what_and_in_one_line() -> None:
    override = Override(by="Anna | Ben", reason="it is\nFriday")
    text = describe("demo", "a" * 64, WAITING.model_copy(update={"override": override}))
    assert r"The gate is overridden by Anna \| Ben: it is Friday" in text.splitlines()
