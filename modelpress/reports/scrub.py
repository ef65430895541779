"""What a reading of a whole store found."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from modelpress.reports.base import Report


class Finding(Report):
    """One object that is not as it should be."""

    kind: Literal["missing", "damaged", "foreign", "untrusted", "unreferenced"]
    """`foreign`: nothing that publishing, signing or promoting writes. All but `unreferenced` are errors."""
    key: str
    """Its key in the store."""
    pack: str
    """Which pack (`name@digest`) or alias (`name@alias`) it belongs to; empty for none."""
    problem: str
    """What was found, and what should have been."""

    @property
    def is_error(self) -> bool:
        """Whether the store is not in order because of it."""
        return self.kind != "unreferenced"

    def line(self) -> str:
        """For people."""
        return f"{self.kind} {self.key}" + (f" of {self.pack}" if self.pack else "") + f": {self.problem}"


class PackRow(Report):
    """One pack."""

    name: str
    """Its name."""
    digest: str
    """Of its manifest."""
    blobs: int
    """Blobs that it lists."""
    blob_bytes: int
    """Their bytes; other packs may have some of them too."""
    signed_by: str
    """Whose signatures vouch for it."""


class ScrubState(Report):
    """How far a pass over the blobs came: what is kept, so that the next run goes on."""

    uri: str
    """The store."""
    began: datetime
    """When the pass began, UTC."""
    seen: datetime
    """When the last of these blobs was read, UTC."""
    finished: datetime | None = None
    """When it ended; the next run begins a new one."""
    after: str = ""
    """Key of the last blob that was read; blobs are read in the order of their keys."""
    read_blobs: int = 0
    """Blobs read."""
    read_bytes: int = 0
    """Bytes of them."""
    damaged: tuple[Finding, ...] = ()
    """What was wrong with some of them; they are read again by the next run."""


class ScrubReport(Report):
    """A reading of everything in a store."""

    uri: str
    """The store."""
    packs: tuple[PackRow, ...]
    """Every pack whose manifest is in order."""
    aliases: int
    """Aliases, each with its whole log followed."""
    signatures: int
    """Signatures."""
    decisions: int
    """What gates decided of packs, also of packs that are gone."""
    runs: int = 0
    """Runs that are kept beside packs, each with its page."""
    trusted: bool
    """Whether signatures were held to a trust file."""
    blobs: int
    """Blobs in the store."""
    blob_bytes: int
    """Their bytes."""
    read_blobs: int
    """Blobs whose every byte was read now."""
    read_bytes: int
    """Their bytes."""
    resumed_blobs: int
    """Blobs that an earlier run of the same pass read."""
    errors: int
    """Findings that are errors."""
    findings: tuple[Finding, ...]
    """What is not as it should be; the first thousand."""
    began: datetime
    """When the pass began, UTC."""
    seconds: float
    """Wall time of this run."""
