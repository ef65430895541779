"""One model as it is served: what answers, what failed, and what clients may know of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from modelpress import load
from modelpress.errors import (
    AccessDeniedError,
    CorruptionError,
    KeyRefusedError,
    LogCutError,
    ModelpressError,
    NotFoundError,
    SelfTestError,
    SetupError,
    SignatureError,
    StoreUnavailableError,
    TrustFileError,
    UnsignedError,
    UnsupportedFormatError,
)
from modelpress.pointer import Pointer
from serving.engine import Engine
from serving.processed import SUFFIX
from serving.refusals import NotReadyError, NotServedError

BROKEN = "its execution provider failed; it is loaded again at the next poll"

PUBLIC_REASONS: list[tuple[type[ModelpressError], str]] = [
    (LogCutError, "the pointer's log lost or changed an entry that was loaded"),
    (UnsignedError, "a signature is missing"),
    (SignatureError, "a signature is not what it should be"),
    (KeyRefusedError, "it is signed by a key that does not count"),
    (TrustFileError, "the server's trust file can't be used"),
    (CorruptionError, "its bytes are not what the manifest says"),
    (UnsupportedFormatError, "it was written by a newer modelpress"),
    (NotFoundError, "the pointer, or an object of the pack, is missing"),
    (AccessDeniedError, "the store refused access"),
    (StoreUnavailableError, "the store does not answer"),
    (SetupError, "the execution provider did not start"),
    (SelfTestError, "it does not answer what it answered when it was published"),
]


@dataclass(frozen=True)
class Loaded:
    """A pack that answers, and the pointer entry that says so. One object, so that both change at once."""

    engine: Engine
    pointer: Pointer | None
    """The entry; None for a pack that is held beside what the pointer names."""
    trust: str | None = None
    """`Trust.fingerprint` when the pack's signatures were checked; None where none are asked for."""


@dataclass(frozen=True)
class Failure:
    """Why the pointer's pack is not the one that answers. `reason` is for clients, the log has the whole error."""

    number: int | None
    reason: str
    attempts: int
    retry_at: float


class ServedModel:
    """One model name and the alias that it follows."""

    def __init__(self, name: str, alias: str) -> None:
        self.name, self.alias = name, alias
        self.loaded: Loaded | None = None
        self.held: Mapping[str, Loaded] = {}
        """Packs beside it, by digest (a canary's); they answer who asks for their digest. Never changed in place."""
        self.newest: Pointer | None = None
        """The newest entry that was loaded; what stands in the store may not be older. Forgotten at an unload."""
        self.failure: Failure | None = None
        self.failed_loads = 0
        """Since the start."""
        self.unloaded = False
        """Taken out by request: stays out until it is asked in again."""
        self.kept: Pointer | None = None
        """The entry that was kept on this machine last, or tried to."""
        self.tried: str | None = None
        """Digest of the pack that was loaded last, or tried to."""
        self.lost: datetime | None = None
        """Since when the store has not answered what this model's pointer is; None where it did the last time."""
        self.lock = threading.Lock()
        """Held while it changes. Requests do not take it: they read `loaded` once."""

    @property
    def ready(self) -> bool:
        """Whether it answers, or was taken out on purpose."""
        return self.unloaded or (self.loaded is not None and not self.loaded.engine.broken)

    def answering(self, version: str | None = None) -> Loaded:
        """What answers now, for any version or for a digest (whole, or its first 12 digits and more).

        Raises:
            NotReadyError: nothing is loaded, or it broke.
            NotServedError: another version is.
        """
        loaded = self._of_version(version)
        if loaded is None:
            reason = self.failure.reason if self.failure else "it is not loaded"
            raise NotReadyError(f"model {self.name!r}", found=reason, expected="a loaded pack")
        if loaded.engine.broken:
            raise NotReadyError(f"model {self.name!r}", found=BROKEN, expected="a loaded pack")
        return loaded

    def versions(self) -> list[str]:
        """Digests of the packs that answer, the one that answers everybody first."""
        loaded = self.loaded
        return list(dict.fromkeys(([loaded.engine.pack] if loaded else []) + list(self.held)))

    def _of_version(self, version: str | None) -> Loaded | None:
        loaded, held = self.loaded, self.held
        if version is None or loaded is None:
            return loaded
        there = {loaded.engine.pack: loaded} | {pack: one for pack, one in held.items() if pack != loaded.engine.pack}
        fits = [one for pack, one in there.items() if len(version) >= load.MIN_PREFIX and pack.startswith(version)]
        if len(fits) != 1:
            raise NotServedError(f"model {self.name!r}: version", found=version[:80], expected=" or ".join(there))
        return fits[0]


def check_newer(model: ServedModel, entry: Pointer) -> None:
    """A log only grows: one that was cut or overwritten must not swap packs.

    Raises:
        LogCutError: the entry is older than the one that was loaded, or another one of its number.
    """
    newest = model.newest
    if newest and (entry.number < newest.number or (entry.number == newest.number and entry.digest != newest.digest)):
        raise LogCutError(
            f"following the log of {model.name}@{model.alias}",
            found=f"entry {entry.number} (sha256 {entry.digest}) as the newest",
            expected=f"entry {newest.number} (sha256 {newest.digest}), which was loaded, or a later one",
            fix="restore the entry, or append a new one (modelpress promote, modelpress rollback); unloading and "
            "loading the model, or a restart, takes the log as it is (with a trust file: `modelpress trust forget`)",
        )


def waits(failure: Failure | None, number: int) -> bool:
    """Whether the last failure of this entry was too short a while ago for another try."""
    return failure is not None and failure.number == number and time.monotonic() < failure.retry_at


def public_reason(error: ModelpressError) -> str:
    """What a client may read: the errors' own texts name folders and endpoints."""
    for kind, text in PUBLIC_REASONS:
        if isinstance(error, kind):
            return text
    return "the model does not run here"


def index_row(model: ServedModel) -> dict[str, Any]:
    """Name, version, state and, where something is wrong, the reason."""
    loaded, failure = model.loaded, model.failure
    row: dict[str, Any] = {
        "name": model.name,
        "state": "READY" if loaded and not loaded.engine.broken else "UNAVAILABLE",
    }
    if loaded:
        row["version"] = loaded.engine.pack
    broken = BROKEN if loaded and loaded.engine.broken else ""
    reason = failure.reason if failure else broken or ("unloaded by request" if model.unloaded else "")
    return row | ({"reason": reason} if reason else {})


def held_rows(model: ServedModel) -> list[dict[str, Any]]:
    """A row for each pack that is held beside the one that answers."""
    answering = model.loaded.engine.pack if model.loaded else None
    others = [one.engine for pack, one in model.held.items() if pack != answering]
    states = {False: "READY", True: "UNAVAILABLE"}
    return [{"name": model.name, "state": states[one.broken], "version": one.pack, "held": True} for one in others]


def processed_rows(model: ServedModel) -> list[dict[str, Any]]:
    """A row for the model behind its processing, where the pack that answers brings one."""
    loaded = model.loaded
    if loaded is None or loaded.engine.front is None:
        return []
    return [index_row(model) | {"name": f"{model.name}{SUFFIX}"}]
