"""What is in a store: packs, what each needs, and what uploads under way need."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from modelpress import keys
from modelpress.errors import ConfigError, NotFoundError
from modelpress.housekeeping.intents import Found, read_intents
from modelpress.load.names import load_manifest
from modelpress.store.base import ObjectInfo, Store


class PackId(NamedTuple):
    """A published pack."""

    name: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name}@{self.digest[:12]}"


@dataclass(frozen=True)
class PackEntry:
    """What of a manifest matters for keeping order."""

    pack: PackId
    blobs: dict[str, int]
    """Its blobs: sha256 to length."""
    base: str | None
    """Digest of the pack that it is a difference to."""
    manifest_bytes: int
    modified: datetime

    @property
    def size_bytes(self) -> int:
        """All its blobs and its manifest."""
        return sum(self.blobs.values()) + self.manifest_bytes


@dataclass
class Survey:
    """What was seen; `look` again adds to it."""

    packs: dict[PackId, PackEntry] = field(default_factory=dict)
    intents: list[Found] = field(default_factory=list)
    needed: set[str] = field(default_factory=set)
    """Blobs that a manifest or a living intent needs, by any look so far."""

    def look(self, store: Store, now: datetime) -> None:
        """Read the intents, and then the manifests: a writer that withdrew its intent has committed before.

        A manifest that was read once is not read again: it never changes. What is gone since is still needed here.

        Raises:
            CorruptionError: an intent or a manifest is damaged, and may need anything.
            UnsupportedFormatError: one was written by a newer modelpress, and may need anything.
        """
        self.intents = read_intents(store)
        for found in self.living(now):
            self.needed.update(found.intent.blobs)
        for info in store.list(keys.PACKS):
            owner = keys.manifest_owner(info.key)
            if owner is not None and PackId(*owner) not in self.packs:
                self._read(store, PackId(*owner), info)

    def living(self, now: datetime) -> list[Found]:
        """The intents that count."""
        return [found for found in self.intents if found.lives(now)]

    def wanted(self, now: datetime) -> set[PackId]:
        """Packs that a writer is about to commit, to point at, or to build on."""
        living = [found.intent for found in self.living(now)]
        return {PackId(one.name, digest) for one in living for digest in (one.pack, one.base) if digest is not None}

    def _read(self, store: Store, pack: PackId, info: ObjectInfo) -> None:
        try:
            manifest = load_manifest(store.held_to(None), *pack)
        except NotFoundError:  # removed since it was listed
            return
        self.packs[pack] = PackEntry(pack, manifest.blobs(), manifest.base, info.size_bytes, info.modified)
        self.needed.update(manifest.blobs())


def refuse_work_store(store: Store, doing: str) -> None:
    """Stages' outputs are blobs that no manifest names: nothing may be collected where they lie.

    Raises:
        ConfigError: the store keeps stages' outputs.
    """
    for info in store.list("stages/"):
        raise ConfigError(
            doing,
            found=f"stages' outputs ({info.key}) in {store.uri}",
            expected="a store that packs alone are published to",
            fix="give MODELPRESS_STORE and MODELPRESS_WORK two places; a work store is emptied by deleting it",
        )
