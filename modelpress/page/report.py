"""The page of one run, or of one pack where nobody kept its run."""

from __future__ import annotations

from modelpress.page import words
from modelpress.page.parts import Fact, Item, Link, Page, present
from modelpress.page.sections import (
    advice,
    choice,
    gate,
    layers,
    numbers,
    origin,
    profile,
    reasons,
    sizes,
    slices,
    training,
    way,
)
from modelpress.page.story import Story
from modelpress.reports import LatencyReport, QualityReport, RunStage

KIND = "modelpress report"


def report_page(story: Story) -> Page:
    """The whole page; the same story gives the same page."""
    sections = present(
        make(story)
        for make in (
            way.section,
            slices.section,
            training.section,
            sizes.section,
            choice.section,
            layers.section,
            reasons.section,
            profile.section,
            advice.section,
            gate.section,
            origin.section,
            numbers.section,
        )
    )
    return Page(
        title=story.name,
        kind=KIND,
        about=_about(story),
        facts=_facts(story),
        sections=sections,
        footer=_footer(story),
        warnings=_warnings(story),
    )


def _about(story: Story) -> list[Item]:
    items = [Item("pack", story.pack, code=True)] if story.pack else []
    if story.aliases:
        items.append(Item("is", ", ".join(alias for alias, _ in story.aliases)))
    if story.run is not None:
        items += [Item(name, "", link=Link(f"open the {name}", address)) for name, address in story.run.links.items()]
    return items


def _warnings(story: Story) -> list[str]:
    found = []
    if story.run is not None and story.run.stopped:
        found.append(f"This run was stopped, and published nothing: {words.cut(story.run.stopped, 600)}")
    if story.unread is not None:
        found.append(f"What lies beside the pack could not be read, and is not told here: {words.cut(story.unread)}")
    if story.sealed is not None:
        found.append(f"The pack is encrypted, and its reports can't be read here: {words.cut(story.sealed)}")
    for problem in story.refused:
        found.append(f"A run that is kept beside this pack does not count: {words.cut(problem)}")
    return found


def _facts(story: Story) -> list[Fact]:
    facts = [_published(story), _quality(story), *_speed(story), _verdict(story)]
    return [fact for fact in facts if fact is not None]


def _published(story: Story) -> Fact | None:
    if story.manifest is None:
        return None
    published = float(story.manifest.published_bytes)
    source = story.source_bytes
    note = f"{words.ratio(source, published)} smaller than the source's {words.size(source)}" if source else ""
    return Fact("published", words.size(published), note)


def served_quality(story: Story) -> QualityReport | None:
    """Quality of what is served: of the last stage that was judged."""
    qualities = story.qualities()
    if story.run is not None and story.run.served in qualities:
        return qualities[story.run.served]
    if story.run is not None:
        return next(reversed(qualities.values()), None)
    order = ("quantize", "plan", "export")
    return next((qualities[stage] for stage in order if stage in qualities), None)


def served_stage(story: Story) -> RunStage | None:
    """The stage whose output is served."""
    return story.run.stage(story.run.served) if story.run is not None else None


def _quality(story: Story) -> Fact | None:
    found = served_quality(story)
    if found is None:
        return Fact("quality", words.UNMEASURED)
    note = f"{words.difference(found)} against the source" if found.difference is not None else ""
    return Fact(found.metric, f"{found.value:.4f}", note or f"{found.low:.4f} to {found.high:.4f}")


def _speed(story: Story) -> list[Fact]:
    stage = served_stage(story)
    of_one, of_many = ends(stage)
    if of_one is None or of_many is None:
        return [Fact("latency", words.UNMEASURED), Fact("throughput", words.UNMEASURED)]
    latency = Fact(
        f"latency, batch {of_one.batch_size}",
        words.time(of_one.p50_seconds),
        f"median; {words.time(of_one.p99_seconds)} at the 99th percentile",
    )
    compared = ends(story.run.stage(story.run.compared) if story.run is not None else None)[1]
    note = f"batch {of_many.batch_size}"
    if compared is not None and compared.batch_size == of_many.batch_size:
        note += f"; {words.ratio(of_many.throughput_per_second, compared.throughput_per_second)} the source's"
    return [latency, Fact("throughput", words.rate(of_many.throughput_per_second), note)]


def ends(stage: RunStage | None) -> tuple[LatencyReport | None, LatencyReport | None]:
    """What was timed of a stage at the smallest and at the largest batch."""
    rows = stage.evaluation.latency if stage is not None and stage.evaluation is not None else []
    ordered = sorted(rows, key=lambda row: row.batch_size)
    return (ordered[0], ordered[-1]) if ordered else (None, None)


def _verdict(story: Story) -> Fact | None:
    if story.manifest is None:
        return None
    record = gate.newest_record(story)
    if record is None:
        return Fact("gate", "not judged")
    decision = record.decision
    mood = {"pass": "good", "fail": "bad", "inconclusive": "open"}[decision.verdict]
    note = f"{record.alias}: {'promoted' if decision.promote else 'not promoted'}"
    if decision.override is not None and decision.promote:
        note += f", overridden by {words.cut(decision.override.by, 60)}"
    return Fact("gate", decision.verdict, note, mood)


def _footer(story: Story) -> str:
    version = story.manifest.versions.get("modelpress") if story.manifest is not None else None
    made = f"made with modelpress {version}. " if version else ""
    return f"{story.name}, {made}The page stands alone: nothing in it is fetched from anywhere."
