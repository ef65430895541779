"""The page of two packs side by side: what changed, by how much, and whether it is better."""

from __future__ import annotations

from collections.abc import Sequence

from modelpress import changes
from modelpress.page import words
from modelpress.page.parts import Fact, Figure, Item, Page, Section, Table, listed, present
from modelpress.page.plots import Dot, Spot, dots, scatter
from modelpress.page.report import ends, served_quality, served_stage
from modelpress.page.sections import gate
from modelpress.page.story import Story, read_story
from modelpress.reports.changes import ChangesReport, FieldChange, TensorDifference
from modelpress.store.base import Store

KIND = "modelpress comparison"
SHOWN, LISTED = 20, 150


def read_comparison(
    store: Store, before: tuple[str, str], after: tuple[str, str]
) -> tuple[ChangesReport, Story, Story]:
    """What a store says of two packs, and of what changed from one to the other; see `changes.compare`.

    Raises:
        NotFoundError: one of them is not there.
        TrustError, CorruptionError: see `load.load_manifest`.
    """
    found = changes.compare(store, before, after)
    one, two = (read_story(store, side.name, side.pack) for side in (found.before, found.after))
    return found, one, two


def comparison_page(found: ChangesReport, before: Story, after: Story) -> Page:
    """The whole page; the same input gives the same page."""
    same = found.before.pack == found.after.pack
    sections = present(
        [
            _quality(found),
            _bytes(found, before, after),
            _speed(before, after),
            _gates(before, after),
            _tensors(found),
            _fields(found),
        ]
    )
    return Page(
        title=f"{_called(before)} → {_called(after)}",
        kind=KIND,
        about=[Item("from", _named(before), code=True), Item("to", _named(after), code=True)],
        facts=_facts(found, before, after),
        sections=sections,
        footer="The page stands alone: nothing in it is fetched from anywhere.",
        warnings=["Both are the same pack."] if same else [],
    )


def _called(story: Story) -> str:
    return f"{story.name} {(story.pack or '')[:12]}"


def _named(story: Story) -> str:
    aliases = ", ".join(alias for alias, _ in story.aliases)
    return f"{story.name} {story.pack}" + (f" ({aliases})" if aliases else "")


def _facts(found: ChangesReport, before: Story, after: Story) -> list[Fact]:
    one, two = found.before.published_bytes, found.after.published_bytes
    facts = [Fact("published", words.size(two), f"{words.size(one)} before, {_change(one, two)}")]
    for row in found.quality[:1]:
        mood = "good" if row.low > 0 else "bad" if row.high < 0 else ""
        said = f"{row.difference:+.4f}, from {row.low:+.4f} to {row.high:+.4f}"
        facts.append(Fact(row.metric, f"{row.after:.4f}", f"{row.before:.4f} before; {said}", mood))
    (_, was), (first, now) = (ends(served_stage(story)) for story in (before, after))
    if now is not None and first is not None:
        note = words.rate(was.throughput_per_second) + " before" if was is not None else ""
        facts.append(Fact(f"throughput, batch {now.batch_size}", words.rate(now.throughput_per_second), note))
    else:
        facts.append(Fact("throughput", words.UNMEASURED))
    facts.append(Fact("tensors that differ", f"{len(found.tensors):,}", f"{found.equal_tensors:,} are the same"))
    return facts


def _change(before: float, after: float) -> str:
    return f"{(after - before) / before:+.1%}" if before else "–"


def _quality(found: ChangesReport) -> Section:
    if found.unmeasured is not None:
        return Section(key="quality", title="Quality", lead=[f"Not compared: {found.unmeasured}."])
    rows = [
        [
            one.metric,
            f"{one.before:.4f}",
            f"{one.after:.4f}",
            f"{one.difference:+.4f}",
            f"{one.low:+.4f} to {one.high:+.4f}",
            f"{one.samples:,}" + ("" if one.paired else ", others than before"),
        ]
        for one in found.quality
    ]
    confidence = found.quality[0].confidence if found.quality else 0.95
    heads = ["metric", "before", "after", "difference", f"{confidence:.0%} interval", "samples"]
    names = [one.metric for one in found.quality]
    series = {"difference": [Dot(one.metric, one.difference, one.low, one.high) for one in found.quality]}
    figure = Figure(
        key="quality-difference",
        caption=f"Difference of each metric, with its {confidence:.0%} interval; right of 0 is better",
        svg=dots(
            "quality-difference",
            "; ".join(f"{row[0]} {row[3]}, {row[4]}" for row in rows),
            names,
            series,
            unit="after − before",
            line=(0.0, "no difference"),
        ),
    )
    said = [_verdict(one.metric, one.low, one.high) for one in found.quality]
    table = Table("Metrics on held-out data", heads, rows, frozenset(range(1, 6)))
    return Section(key="quality", title="Quality", lead=said, figures=[figure] if names else [], tables=[table])


def _verdict(metric: str, low: float, high: float) -> str:
    if low > 0:
        return f"{metric} is better, by the whole interval."
    if high < 0:
        return f"{metric} is worse, by the whole interval."
    return f"{metric}: these samples do not show a difference."


def _bytes(found: ChangesReport, before: Story, after: Story) -> Section:
    rows = []
    for what, name in (("raw", "raw_bytes"), ("published", "published_bytes")):
        one, two = getattr(found.before, name), getattr(found.after, name)
        rows.append([what, f"{one:,}", f"{two:,}", f"{two - one:+,}", _change(one, two)])
    figure = _points(before, after)
    return Section(
        key="bytes",
        title="Bytes",
        lead=[f"{found.shared_bytes:,} bytes of blobs are in both packs, and are stored once."],
        figures=[figure] if figure is not None else [],
        tables=[Table("Bytes", ["of", "before", "after", "change", "share"], rows, frozenset(range(1, 5)))],
    )


def _points(before: Story, after: Story) -> Figure | None:
    """Both packs by bytes and quality."""
    spots = {}
    for name, story in (("before", before), ("after", after)):
        quality = served_quality(story)
        if quality is None or story.manifest is None:
            return None
        spots[name] = Spot(float(story.manifest.published_bytes), quality.value, name)
    rows = [[name, f"{spot.x:,.0f}", f"{spot.y:.4f}"] for name, spot in spots.items()]
    key = "bytes-quality"
    return Figure(
        key=key,
        caption="Published bytes and quality of both; up and to the left is better",
        svg=scatter(
            key,
            "; ".join(" ".join(row) for row in rows),
            {name: [spot] for name, spot in spots.items()},
            None,
            axes_named=("published bytes", after.metric),
        ),
        table=Table("Bytes and quality", ["pack", "bytes", "quality"], rows, frozenset({1, 2})),
    )


def _speed(before: Story, after: Story) -> Section:
    by_batch: dict[int, dict[str, list[str]]] = {}
    machines = []
    series: dict[str, list[Dot]] = {}
    for side, story in (("before", before), ("after", after)):
        stage = served_stage(story)
        if stage is None or stage.evaluation is None:
            continue
        machines.append(stage.evaluation.hardware)
        for row in stage.evaluation.latency:
            said = [words.time(row.p50_seconds), words.time(row.p99_seconds), words.rate(row.throughput_per_second)]
            by_batch.setdefault(row.batch_size, {})[side] = said
            milliseconds = (row.p50_seconds * 1000, row.p50_seconds * 1000, row.p99_seconds * 1000)
            series.setdefault(side, []).append(Dot(f"batch {row.batch_size}", *milliseconds))
    if len(machines) < 2:
        lead = "Not compared: the run of at least one of them is not kept beside its pack."
        return Section(key="speed", title="Speed", lead=[lead])
    lead = "Both were measured by their own runs, on machines that have no class: compare with care."
    if machines[0] is not None and machines[0] == machines[1]:
        lead = f"Both were measured on machines of class {machines[0]}."
    elif any(machine is not None for machine in machines):
        named = " and ".join(machine or "one without class" for machine in machines)
        lead = f"They were measured on machines of different classes: {named}. Times of one say nothing of the other's."
    missing = [words.UNMEASURED] * 3
    rows = [
        [f"batch {batch}: {what}", sides.get("before", missing)[place], sides.get("after", missing)[place]]
        for batch, sides in sorted(by_batch.items())
        for place, what in enumerate(("p50", "p99", "throughput"))
    ]
    names = [f"batch {batch}" for batch in sorted(by_batch)]
    key = "speed-latency"
    figure = Figure(
        key=key,
        caption="Time of a call: the mark is the median, the bar ends at the 99th percentile",
        svg=dots(key, "Milliseconds of a call by batch size", names, series, unit="milliseconds of a call", log=True),
    )
    table = Table("What is served", ["measured", "before", "after"], rows, frozenset({1, 2}))
    return Section(key="speed", title="Speed", lead=[lead], figures=[figure], tables=[table])


def _gates(before: Story, after: Story) -> Section:
    lead = []
    for story in (before, after):
        record = gate.newest_record(story)
        said = gate.verdict(record.decision, record.alias) if record else "no gate has judged it."
        lead.append(f"{_called(story)}: {said}")
    return Section(key="gate", title="The gate", lead=lead)


def _tensors(found: ChangesReport) -> Section:
    ordered = sorted(found.tensors, key=lambda one: (-abs(one.stored_after - one.stored_before), one.name))
    rows = [
        [
            words.cut(one.name, 160),
            one.what,
            one.before or "–",
            one.after or "–",
            f"{one.stored_before:,}",
            f"{one.stored_after:,}",
            f"{one.stored_after - one.stored_before:+,}",
        ]
        for one in ordered[:LISTED]
    ]
    if rest := ordered[LISTED:]:
        sums = sum(one.stored_before for one in rest), sum(one.stored_after for one in rest)
        rows.append([f"{len(rest):,} more", "", "", "", f"{sums[0]:,}", f"{sums[1]:,}", f"{sums[1] - sums[0]:+,}"])
    heads = ["tensor", "what", "before", "after", "stored before", "stored after", "change"]
    figure = _moved(ordered[:SHOWN]) if any(one.stored_after != one.stored_before for one in ordered) else None
    return Section(
        key="tensors",
        title="Tensors",
        lead=[f"{len(found.tensors):,} tensors differ, {found.equal_tensors:,} are the same."],
        figures=[figure] if figure is not None else [],
        tables=[Table("Tensors that differ, by what their bytes changed", heads, rows, frozenset({4, 5, 6}))],
    )


def _moved(ordered: Sequence[TensorDifference]) -> Figure:
    rows = [(one.name, one.stored_after - one.stored_before) for one in ordered]
    key = "tensors-moved"
    series = {"change": [Dot(name, float(change)) for name, change in rows]}
    return Figure(
        key=key,
        caption=f"Change of stored bytes, the {len(rows)} tensors that changed most",
        svg=dots(
            key,
            "Change of stored bytes by tensor",
            [name for name, _ in rows],
            series,
            unit="bytes",
            line=(0.0, "no change"),
        ),
    )


def _fields(found: ChangesReport) -> Section | None:
    tables = [
        _changes(title, fields)
        for title, fields in (("Recipe", found.config), ("Manifest", found.about), ("Files", found.files))
        if fields
    ]
    if not tables:
        return None
    return Section(key="fields", title="Recipe, versions and files", tables=tables)


def _changes(title: str, fields: Sequence[FieldChange]) -> Table:
    rows = [[words.cut(one.field, 160), words.cut(one.before or "–"), words.cut(one.after or "–")] for one in fields]
    return listed(title, ["field", "before", "after"], rows, LISTED)
