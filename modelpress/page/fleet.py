"""The page of all models in a store: what each alias serves, how large, how good, how fast, and what gates said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from modelpress import keys, pointer
from modelpress.errors import FormatError, NotFoundError, TrustError
from modelpress.page import registry as registered
from modelpress.page import words
from modelpress.page.parts import Fact, Figure, Item, Page, Section, Table, listed, present
from modelpress.page.plots import Spot, scatter
from modelpress.page.registry import Registry
from modelpress.page.report import ends, served_quality, served_stage
from modelpress.page.sections import gate
from modelpress.page.story import Story, read_story
from modelpress.progress import Progress, silent
from modelpress.store.base import Store

KIND = "modelpress fleet"
LISTED = 500
DRAWN = 60


@dataclass(frozen=True)
class Served:
    """What one alias of one model points at."""

    name: str
    alias: str
    since: datetime | None
    number: int
    """Of the log's entry: how often the alias was moved."""
    story: Story | None
    """None where the pack can't be read."""
    pack: str = ""
    """Digest of the pack; empty where the log can't be read."""
    problem: str = ""
    """Why the log or the pack can't be read."""


@dataclass(frozen=True)
class Fleet:
    """All models of a store."""

    uri: str
    served: Sequence[Served]
    packs: dict[str, frozenset[str]]
    """Digests of the published packs by name."""

    @property
    def versions(self) -> dict[str, int]:
        """Number of published packs by name."""
        return {name: len(packs) for name, packs in self.packs.items()}


def read_fleet(
    store: Store, alias: str | None = None, progress: Progress = silent, *, names: Sequence[str] = ()
) -> Fleet:
    """Read what every alias of every name points at; one that is damaged or not vouched for is shown as such.

    Args:
        store: the publication store.
        alias: this alias alone; None takes all of them.
        progress: called with names that were read, and all names.
        names: these alone, those that there are; empty takes all.

    Raises:
        StoreError: the store does not answer.
    """
    there = sorted(name for name in store.folders(keys.PACKS) if keys.is_name(name) and (not names or name in names))
    served: list[Served] = []
    packs: dict[str, frozenset[str]] = {}
    for number, name in enumerate(there, 1):
        places = (keys.place(info.key) for info in store.list(keys.manifests(name)))
        packs[name] = frozenset(place.digest for place in places if place is not None and place.kind == "manifest")
        for one in sorted(store.folders(f"{keys.manifests(name)}refs/")):
            if keys.is_alias(one) and alias in (None, one):
                served += _read(store, name, one)
        progress(number, len(there), name)
    return Fleet(store.uri, served, packs)


def _read(store: Store, name: str, alias: str) -> list[Served]:
    """What an alias points at; nothing where its log is empty."""
    pack = ""
    try:
        entry = pointer.current(store, name, alias)
        if entry is None:
            return []
        pack = entry.pack
        return [Served(name, alias, entry.created, entry.number, read_story(store, name, pack), pack)]
    except (FormatError, TrustError, NotFoundError) as error:
        return [Served(name, alias, None, 0, None, pack, error.found or error.doing)]


def fleet_page(fleet: Fleet, registry: Registry | None = None) -> Page:
    """The whole page; the same fleet and the same registry give the same page."""
    readable = [one for one in fleet.served if one.story is not None]
    broken = [one for one in fleet.served if one.story is None]
    warnings = [f"{len(broken)} aliases point at what can't be read."] if broken else []
    return Page(
        title="All models",
        kind=KIND,
        about=[
            Item("store", fleet.uri, code=True),
            *([Item("registry", registry.address, code=True)] if registry is not None else []),
        ],
        facts=[*(registered.facts(registry, fleet) if registry is not None else []), *_facts(fleet, readable, broken)],
        sections=present(
            [
                *(registered.sections(registry, fleet) if registry is not None else []),
                *(_models(readable, fleet.versions), _plots(readable), _broken(broken), _idle(fleet)),
            ]
        ),
        footer="The page stands alone: nothing in it is fetched from anywhere.",
        warnings=[*(registered.warnings(registry, fleet) if registry is not None else []), *warnings],
    )


def _facts(fleet: Fleet, readable: Sequence[Served], broken: Sequence[Served]) -> list[Fact]:
    blobs: dict[str, int] = {}
    for one in readable:
        if one.story is not None and one.story.manifest is not None:
            blobs |= one.story.manifest.blobs()
    verdicts = [_record(one) for one in readable]
    passed = sum(verdict == "pass" for verdict in verdicts)
    return [
        Fact("models", f"{len(fleet.versions):,}", f"{sum(fleet.versions.values()):,} published versions"),
        Fact("aliases", f"{len(fleet.served):,}", f"{len(broken):,} can't be read", "bad" if broken else ""),
        Fact("bytes that aliases serve", words.size(sum(blobs.values())), "shared blobs counted once"),
        Fact("passed the gate", f"{passed:,}", f"of {len(readable):,}"),
    ]


def _record(one: Served) -> str:
    record = gate.newest_record(one.story) if one.story is not None else None
    return record.decision.outcome() if record is not None else "not judged"


def _models(readable: Sequence[Served], versions: dict[str, int]) -> Section:
    heads = ["model", "alias", "gate", "quality", "against the source", "published", "smaller", "p50, batch 1 or least"]
    heads += ["throughput", "versions", "since", "pack"]
    rows = [_row(one, versions) for one in readable]
    lead = [] if rows else ["No alias points at a pack that can be read."]
    table = listed("What each alias serves", heads, rows, LISTED, frozenset({5, 6, 7, 8, 9}))
    return Section(key="models", title="What is served", lead=lead, tables=[table])


def _row(one: Served, versions: dict[str, int]) -> list[str]:
    story = one.story
    assert story is not None
    quality = served_quality(story)
    first, last = ends(served_stage(story))
    published = float(story.manifest.published_bytes) if story.manifest is not None else None
    return [
        one.name,
        one.alias,
        words.cut(_record(one), 80),
        f"{story.metric} {words.quality(quality)}" if quality is not None else words.UNMEASURED,
        words.difference(quality),
        words.size(published),
        words.ratio(story.source_bytes, published),
        words.time(first.p50_seconds if first else None),
        words.rate(last.throughput_per_second if last else None),
        f"{versions.get(one.name, 0):,}",
        one.since.isoformat(" ", "minutes") if one.since is not None else "–",
        (story.pack or "")[:12],
    ]


def _plots(readable: Sequence[Served]) -> Section | None:
    spots = []
    for one in readable:
        story = one.story
        if story is not None and story.manifest is not None and story.source_bytes:
            ratio = story.source_bytes / story.manifest.published_bytes
            quality = served_quality(story)
            lost = quality.difference if quality is not None else None
            if lost is not None:
                spots.append((one, Spot(ratio, lost, one.name if one.alias == "champion" else "")))
    if len(spots) < 2:
        return None
    key = "fleet-points"
    shown = spots[:DRAWN]
    series: dict[str, list[Spot]] = {}
    for one, spot in shown:
        series.setdefault(one.alias, []).append(spot)
    rows = [[f"{one.name}@{one.alias}", f"{spot.x:.2f}×", f"{spot.y:+.4f}"] for one, spot in spots[:LISTED]]
    figure = Figure(
        key=key,
        caption="How much smaller each is than its source, and what that cost in its metric; up and right is better",
        svg=scatter(
            key,
            f"Difference in quality against how many times smaller, of {len(shown)} aliases",
            series,
            None,
            axes_named=("times smaller than the source", "difference in quality"),
            limit=(0.0, "as good as the source"),
        ),
        table=Table("Smaller, and what it cost", ["alias", "smaller", "difference"], rows, frozenset({1, 2})),
    )
    return Section(key="points", title="Bytes against quality", figures=[figure])


def _broken(broken: Sequence[Served]) -> Section | None:
    if not broken:
        return None
    rows = [[f"{one.name}@{one.alias}", words.cut(one.problem)] for one in broken]
    table = listed("Aliases that point at what can't be read", ["alias", "why"], rows, LISTED)
    return Section(key="broken", title="What can't be read", tables=[table])


def _idle(fleet: Fleet) -> Section | None:
    """Names that are published, and that no alias points at."""
    names = {one.name for one in fleet.served}
    rows = [[name, f"{count:,}"] for name, count in fleet.versions.items() if name not in names and count]
    if not rows:
        return None
    table = listed("Names without an alias", ["model", "versions"], rows, LISTED, frozenset({1}))
    return Section(key="idle", title="Published, and not served", tables=[table])
