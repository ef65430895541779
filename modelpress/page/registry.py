"""What a model registry says, beside what lies in the store: versions, aliases, verdicts, and what does not fit.

Whoever reads a registry makes a `Registry` of it; nothing here knows which one it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from modelpress.page import words
from modelpress.page.parts import Fact, Section, listed

if TYPE_CHECKING:
    from modelpress.page.fleet import Fleet, Served

LISTED = 500
SHORT = 12
"""Digits of a digest that are shown."""


@dataclass(frozen=True)
class Version:
    """One registered version."""

    name: str
    number: str
    pack: str
    """Digest of the pack that it carries; empty where it carries none."""
    uri: str = ""
    """Where the pack's manifest lay when it was registered."""
    created: datetime | None = None
    verdict: str = ""
    """What a gate said of it last; empty where none did."""
    notes: Sequence[str] = ()
    """What people have to know of it: an override, a promotion that was undone."""
    compression_ratio: float | None = None
    speedup: float | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    """What else it is tagged with, such as its metric, and tags of people's own."""


@dataclass(frozen=True)
class Registry:
    """A model registry."""

    address: str
    models: Sequence[str]
    """Names of the registered models."""
    versions: Sequence[Version]
    """All of them, the newest of each model first."""
    aliases: Mapping[tuple[str, str], str]
    """Number of the version that an alias names, by model and alias."""


@dataclass(frozen=True)
class Alias:
    """One alias, in the registry and in the store."""

    name: str
    alias: str
    number: str | None
    """Of the version that the registry's alias names; None where the registry has no such alias."""
    version: Version | None
    """That version; None also where the registry has none of this number."""
    served: Served | None
    """What servers follow; None where the store has no such pointer."""

    @property
    def problem(self) -> str:
        """What is wrong with it; empty where nothing is."""
        if self.served is None or not self.served.pack:
            return ""
        follow = f"servers follow pack {self.served.pack[:SHORT]}"
        if self.number is None:
            return f"{follow}, and the registry has no such alias"
        if self.version is None:
            return f"{follow}, and the registry names version {self.number}, which it does not have"
        if self.version.pack != self.served.pack:
            named = f"pack {self.version.pack[:SHORT]}" if self.version.pack else "no pack"
            return f"{follow}, and the registry names version {self.number} of {named}"
        return ""


def aliases(registry: Registry, fleet: Fleet) -> list[Alias]:
    """All aliases of the registry and of the store, by model."""
    served = {(one.name, one.alias): one for one in fleet.served}
    versions = {(one.name, one.number): one for one in registry.versions}
    found = []
    for name, alias in sorted({*registry.aliases, *served}):
        number = registry.aliases.get((name, alias))
        version = versions.get((name, number)) if number is not None else None
        found.append(Alias(name, alias, number, version, served.get((name, alias))))
    return found


def facts(registry: Registry, fleet: Fleet) -> list[Fact]:
    """For the head of the page."""
    missing = list(_missing(registry, fleet))
    amiss = [one for one in aliases(registry, fleet) if one.problem]
    carrying = sum(bool(one.pack) for one in registry.versions)
    return [
        Fact("registered models", f"{len(registry.models):,}", f"{len(registry.versions):,} versions"),
        Fact("packs that are missing", f"{len(missing):,}", f"of {carrying:,} registered", "bad" if missing else ""),
        Fact("aliases that differ", f"{len(amiss):,}", "from what servers follow", "bad" if amiss else ""),
    ]


def warnings(registry: Registry, fleet: Fleet) -> list[str]:
    """What the reader must know before all else."""
    missing, amiss = list(_missing(registry, fleet)), [one for one in aliases(registry, fleet) if one.problem]
    found = []
    if missing:
        found.append(f"{len(missing):,} registered versions carry packs that are not in this store.")
    if amiss:
        found.append(f"{len(amiss):,} aliases of the registry do not say what servers follow.")
    return found


def sections(registry: Registry, fleet: Fleet) -> list[Section | None]:
    """What the registry says, and what of it does not fit what lies in the store."""
    return [_amiss(registry, fleet), _said(registry, fleet)]


def _missing(registry: Registry, fleet: Fleet) -> Iterator[Version]:
    """Versions whose pack is not in the store."""
    return (one for one in registry.versions if one.pack and one.pack not in fleet.packs.get(one.name, ()))


def _amiss(registry: Registry, fleet: Fleet) -> Section | None:
    rows = [[f"{one.name}@{one.alias}", one.problem] for one in aliases(registry, fleet) if one.problem]
    for one in _missing(registry, fleet):
        where = f", and was registered at {one.uri}" if one.uri else ""
        rows.append([f"{one.name} version {one.number}", f"pack {one.pack[:SHORT]} is not in this store{where}"])
    named = {(one.name, one.pack) for one in registry.versions}
    for name, packs in fleet.packs.items():
        if others := sum((name, pack) not in named for pack in packs):
            rows.append([name, f"{others:,} of {len(packs):,} published packs are carried by no version"])
    if not rows:
        return None
    rows = [[what, words.cut(said)] for what, said in rows]
    table = listed("What does not fit together", ["of", "what"], rows, LISTED)
    return Section(key="amiss", title="Registry and store do not fit together", tables=[table])


def _said(registry: Registry, fleet: Fleet) -> Section:
    heads = ["model", "alias", "version", "gate", "pack", "in the store", "smaller", "faster", "tags", "notes"]
    rows = [
        [one.name, one.alias, *_row(one.version, fleet, one.number)]
        for one in aliases(registry, fleet)
        if one.number is not None
    ]
    by_alias: dict[tuple[str, str], list[str]] = {}
    for (name, alias), number in sorted(registry.aliases.items()):
        by_alias.setdefault((name, number), []).append(alias)
    every = [
        [one.name, ", ".join(by_alias.get((one.name, one.number), ())) or "–", *_row(one, fleet, one.number)]
        for one in registry.versions
    ]
    plain = sorted(set(registry.models) - {one.name for one in registry.versions if one.pack})
    lead = [] if rows else ["No alias is set in the registry."]
    if plain:
        lead.append(f"Without a pack: {words.cut(', '.join(plain))}.")
    tables = [listed("What the registry's aliases name", heads, rows, LISTED, frozenset({2, 6, 7}))]
    heads = ["model", "aliases", *heads[2:]]
    caption = f"All {len(every):,} versions, the newest of each model first"
    tables.append(listed(caption, heads, every, LISTED, frozenset({2, 6, 7}), folded=True))
    return Section(key="registry", title="What the registry says", lead=lead, tables=tables)


def _row(version: Version | None, fleet: Fleet, number: str | None) -> list[str]:
    if version is None:
        return [number or "–", "–", "no such version", "–", "–", "–", "–", "–"]
    there = "–"
    if version.pack:
        there = "yes" if version.pack in fleet.packs.get(version.name, ()) else "missing"
    return [
        version.number,
        version.verdict or "not judged",
        version.pack[:SHORT] or "none",
        there,
        f"{version.compression_ratio:.2f}×" if version.compression_ratio is not None else words.UNMEASURED,
        f"{version.speedup:.2f}×" if version.speedup is not None else words.UNMEASURED,
        words.cut(", ".join(f"{key} {value}" for key, value in sorted(version.tags.items())) or "–", 200),
        words.cut("; ".join(version.notes) or "–"),
    ]
