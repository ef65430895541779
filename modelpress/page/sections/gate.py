"""What gates said, in words and check by check, and which aliases point at the pack."""

from __future__ import annotations

from modelpress.decisions import Kept, Record
from modelpress.page import words
from modelpress.page.parts import Section, Table
from modelpress.page.story import Story
from modelpress.reports import Decision


def section(story: Story) -> Section | None:
    """The newest decision in words; the earlier ones as a table."""
    if story.manifest is None:
        return None
    newest = newest_record(story)
    points = [f"{alias} points at this pack since {since}." for alias, since in story.aliases]
    if not points:
        points = ["No alias points at this pack."]
    if newest is None:
        lead = ["No gate has judged this pack, or none that is kept beside it."]
        return Section(key="gate", title="The gate", lead=lead, points=points, tables=_kept(story))
    return Section(
        key="gate",
        title="The gate",
        lead=[verdict(newest.decision, newest.alias)],
        points=points,
        tables=[_checks(newest), *_kept(story)],
    )


def newest_record(story: Story) -> Record | None:
    """The newest decision that counts."""
    counting = [one.record for one in story.decisions if one.record is not None and one.problem is None]
    return counting[-1] if counting else None


def verdict(decision: Decision, alias: str) -> str:
    """The decision as a sentence."""
    failed = sum(check.verdict == "fail" for check in decision.checks)
    open_ = sum(check.verdict == "inconclusive" for check in decision.checks)
    passed = len(decision.checks) - failed - open_
    text = f"{passed} of {len(decision.checks)} conditions passed, {failed} failed, {open_} could not be decided. "
    if decision.override is not None and decision.promote:
        text += f"A person let it become {alias} all the same: {decision.override.line()}."
    elif decision.promote:
        text += f"The gate let it become {alias}."
    else:
        text += f"The gate did not let it become {alias}."
    if decision.required_samples is not None:
        text += f" About {decision.required_samples:,} samples would decide."
    return text


def _checks(record: Record) -> Table:
    rows = [[check.name, check.verdict, words.cut(check.reason)] for check in record.decision.checks]
    when = record.created.isoformat(" ", "seconds")
    against = f"pack {record.champion[:12]}" if record.champion else "no champion"
    caption = f"Conditions, judged {when} by {record.who}, against {against}"
    return Table(caption, ["condition", "verdict", "why"], rows)


def _kept(story: Story) -> list[Table]:
    rows = [_row(one) for one in reversed(story.decisions)]
    heads = ["when", "who", "alias", "verdict", "moved", "counts"]
    return [Table("All decisions on this pack that are kept", heads, rows, folded=True)] if len(rows) > 1 else []


def _row(one: Kept) -> list[str]:
    counts = "yes" if one.problem is None else words.cut(one.problem.found or "no", 120)
    record = one.record
    if record is None:
        return ["–", "–", "–", "can't be read", "–", counts]
    decision = record.decision
    when = record.created.isoformat(" ", "seconds")
    return [when, record.who, record.alias, decision.outcome(), "yes" if decision.promote else "no", counts]
