"""Reports of collection, retention and usage."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from modelpress.reports.base import Report

Garbage = Literal[
    "unreferenced blob",
    "abandoned upload",
    "unfinished parts",
    "signature without pack",
    "run without pack",
    "probe",
]
"""Why an object is garbage."""


class Counted(Report):
    """Objects of one kind."""

    objects: int = 0
    """How many."""
    size_bytes: int = 0
    """Their bytes."""


class GarbageItem(Report):
    """One object that nothing needs."""

    key: str
    """Its key."""
    reason: Garbage
    """Why."""
    size_bytes: int
    """Its bytes."""
    modified: datetime
    """When it was written, by the store's clock."""


class CollectReport(Report):
    """What a collection found, and what it removed."""

    store: str
    """URI of the store."""
    dry_run: bool
    """True: nothing was removed."""
    grace_seconds: float
    """What is younger was left."""
    packs: int
    """Manifests read."""
    uploads: int
    """Uploads under way, by their intents."""
    needed: Counted
    """Blobs that a manifest needs."""
    uploading: Counted
    """Blobs that uploads under way alone need."""
    young: Counted
    """Objects that nothing needs and that are too young to go."""
    foreign: Counted
    """Objects among the blobs whose keys are none of ours; never touched."""
    garbage: list[GarbageItem] = Field(default_factory=list)
    """What may go."""
    removed: Counted
    """What went."""

    def by_reason(self) -> dict[str, Counted]:
        """Garbage, counted by reason."""
        found: dict[str, Counted] = {}
        for item in self.garbage:
            so_far = found.get(item.reason, Counted())
            found[item.reason] = Counted(objects=so_far.objects + 1, size_bytes=so_far.size_bytes + item.size_bytes)
        return found


class RetainedPack(Report):
    """One version, and what retention says of it."""

    name: str
    """Pack name."""
    pack: str
    """Its digest."""
    modified: datetime
    """When it was committed, by the store's clock."""
    size_bytes: int
    """Its blobs and its manifest; shared blobs count in each."""
    keep: list[str]
    """Why it is kept; empty: it may go."""


class RetainReport(Report):
    """What retention keeps and removes."""

    store: str
    """URI of the store."""
    dry_run: bool
    """True: nothing was removed."""
    packs: list[RetainedPack]
    """Every version, newest first by name."""
    removed: int
    """Manifests that went."""


class VersionUsage(Report):
    """What one version takes."""

    name: str
    """Pack name."""
    pack: str
    """Its digest."""
    modified: datetime
    """When it was committed, by the store's clock."""
    aliases: list[str]
    """Aliases that point at it."""
    total_bytes: int
    """Its blobs and its manifest."""
    alone_bytes: int
    """What would be free without it: blobs that no other version has, and its manifest."""
    shared_bytes: int
    """Blobs that other versions have too."""
    shared_with: list[str]
    """Those versions, as NAME@DIGEST."""
    missing_bytes: int
    """Blobs that the store lacks: the version is broken."""


class UsageReport(Report):
    """What takes how much room in a store."""

    store: str
    """URI of the store."""
    versions: list[VersionUsage]
    """By name, newest first."""
    names: dict[str, int]
    """Bytes by name: each blob once in each name."""
    referenced: Counted
    """Blobs that some version has, each once."""
    unreferenced: Counted
    """Blobs that no version has: of uploads under way, or garbage."""
    other: Counted
    """Everything else: manifests, logs of aliases, signatures."""
    total_bytes: int
    """All objects."""
