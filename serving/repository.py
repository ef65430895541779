"""Which models are served, and how each follows its alias: load beside the old, swap, let the old drain."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from modelpress import keys, load, pointer
from modelpress.errors import (
    AccessDeniedError,
    ConfigError,
    CorruptionError,
    KeyRefusedError,
    LogCutError,
    ModelpressError,
    NotFoundError,
    SelfTestError,
    ServingError,
    SetupError,
    SignatureError,
    StoreUnavailableError,
    TrustFileError,
    UnsignedError,
    UnsupportedFormatError,
)
from modelpress.pointer import Pointer
from modelpress.store import Store
from serving.engine import Engine, load_engine
from serving.kept import Kept
from serving.protocol import NotReadyError, NotServedError

log = logging.getLogger("modelpress.serving")

CHAMPION = "champion"
BROKEN = "its execution provider failed; it is loaded again at the next poll"
MAX_RETRY_SECONDS = 300.0
"""Longest wait before a pack that could not be loaded is fetched again."""


_PUBLIC_REASONS: list[tuple[type[ModelpressError], str]] = [
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
    """What answers now, and the pointer entry that says so. One object, so that both change at once."""

    engine: Engine
    pointer: Pointer
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
        self.newest: Pointer | None = None
        """The newest entry that was loaded; what stands in the store may not be older. Forgotten at an unload."""
        self.failure: Failure | None = None
        self.unloaded = False
        """Taken out by request: stays out until it is asked in again."""
        self.kept: Pointer | None = None
        """The entry that was kept on this machine last, or tried to."""
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
        loaded = self.loaded
        if loaded is None:
            reason = self.failure.reason if self.failure else "it is not loaded"
            raise NotReadyError(f"model {self.name!r}", found=reason, expected="a loaded pack")
        if loaded.engine.broken:
            raise NotReadyError(f"model {self.name!r}", found=BROKEN, expected="a loaded pack")
        pack = loaded.engine.pack
        if version is not None and not (len(version) >= 12 and pack.startswith(version)):
            raise NotServedError(f"model {self.name!r}: version", found=version[:80], expected=pack)
        return loaded


class Repository:
    """The models of one server. Every method is safe to call from threads."""

    def __init__(
        self,
        store: Store,
        models: Sequence[str] = (),
        *,
        provider: str = "CPUExecutionProvider",
        threads: int = 0,
        retry_seconds: float = 1.0,
        kept: Kept | None = None,
        offline_seconds: float = 0.0,
    ) -> None:
        """
        Args:
            store: the publication store.
            models: `NAME` or `NAME@ALIAS`; empty serves every pack that has a champion, also those to come.
            provider: execution provider that must be in use.
            threads: intra-operator threads per session; 0 takes the cores that this process may use.
            retry_seconds: wait after the first failed load of a pack; doubles with each.
            kept: where copies of what is served lie, to start with when the store does not answer; None: nowhere.
            offline_seconds: how long the server counts as ready while the store does not answer; 0: for ever.
        """
        self._store, self._provider, self._threads = store, provider, threads
        self._retry_seconds, self._kept, self._offline_seconds = retry_seconds, kept, offline_seconds
        self._lost: datetime | None = None
        """Since when the store has not answered what packs there are."""
        self._discovers = not models
        self._models: dict[str, ServedModel] = {}
        for model in models:
            name, _, alias = model.partition("@")
            keys.pointers(name, alias or CHAMPION)  # refuses an illegal name here, not at the first poll
            if name in self._models:
                raise ConfigError("choosing models to serve", found=f"{name!r} twice", expected="each name once")
            self._models[name] = ServedModel(name, alias or CHAMPION)

    def start(self) -> None:
        """Load everything. A model that was named must load; one that was only found may be shown as unavailable.

        What is kept on this machine is loaded where the store does not answer.

        Raises:
            ModelpressError: a named model can't be loaded, or the store can't be listed.
        """
        try:
            self._discover()
        except StoreUnavailableError:
            kept = [name for name, alias in self._kept.aliases() if alias == CHAMPION] if self._kept else []
            if not kept:
                raise
            self._models |= {name: ServedModel(name, CHAMPION) for name in kept}
        silent = self._lost is not None
        for model in self.models():
            try:
                if not (silent and self._load_kept(model)):  # each question to a silent store takes minutes
                    self._update(model, force=True)
            except SetupError:
                raise
            except ModelpressError:
                if not self._discovers:
                    raise
            silent = silent or model.lost is not None

    def poll(self) -> None:
        """Look at every pointer once, and load what moved. What fails is logged and shown, never raised."""
        try:
            self._discover()
        except ModelpressError as error:
            log.warning("looking for packs to serve: %s", error)
        for model in self.models():
            try:
                self._update(model)
            except ModelpressError:
                continue  # kept in model.failure and logged there

    def models(self) -> list[ServedModel]:
        """All models, by name."""
        return [model for _, model in sorted(self._models.items())]

    def model(self, name: str) -> ServedModel:
        """The model of this name.

        Raises:
            NotServedError: none.
        """
        found = self._models.get(name)
        if found is None:
            raise NotServedError("model", found=name[:80], expected=f"one of {sorted(self._models)}")
        return found

    def load(self, name: str) -> None:
        """Look at the pointer now, load what it names, and take a model in again that was taken out.

        Raises:
            NotServedError: this server does not serve this name.
            ModelpressError: it can't be loaded; what was loaded before still answers.
        """
        if name not in self._models and self._discovers:
            self._discover()
        self._update(self.model(name), force=True)

    def look(self, name: str) -> None:
        """Look at one pointer now, and load what moved. What fails is logged and shown, never raised."""
        try:
            if name not in self._models:
                self._discover()
            if name in self._models:
                self._update(self._models[name])
        except ModelpressError as error:
            log.warning("looking at %s: %s", name, error)

    def check_may_serve(self, name: str) -> None:
        """Refuse a name that this server neither serves nor would find.

        Raises:
            NotServedError: it is such a one.
        """
        if not self._discovers:
            self.model(name)

    def unload(self, name: str) -> None:
        """Take a model out. Requests that run are answered.

        Raises:
            NotServedError: this server does not serve this name.
        """
        model = self.model(name)
        with model.lock:
            model.unloaded, model.loaded, model.newest, model.failure = True, None, None, None
        log.info("unloaded %s", name)

    @property
    def ready(self) -> bool:
        """Whether every model answers, except those taken out on purpose, and the store was not away for too long."""
        lost = self.lost
        if lost is not None and 0 < self._offline_seconds < (datetime.now(UTC) - lost).total_seconds():
            return False
        return all(model.ready for model in self.models())

    @property
    def lost(self) -> datetime | None:
        """Since when the store has not answered; None where it did the last time, or was not asked yet."""
        return min(
            (at for at in (self._lost, *(model.lost for model in self.models())) if at is not None), default=None
        )

    def index(self) -> list[dict[str, Any]]:
        """One row per model: name, version, state and, where something is wrong, the reason."""
        return [_index_row(model) for model in self.models()]

    def _discover(self) -> None:
        if not self._discovers:
            return
        try:
            found = [name for name in self._store.folders(keys.PACKS) if name not in self._models]
            for name in found:
                if self._has_champion(name):
                    self._models.setdefault(name, ServedModel(name, CHAMPION))
        except StoreUnavailableError:
            self._lost = self._lost or datetime.now(UTC)
            raise
        self._lost = None

    def _has_champion(self, name: str) -> bool:
        try:
            log = keys.pointers(name, CHAMPION)
        except ConfigError:  # a folder that publishing did not make
            return False
        return any(keys.pointer_owner(info.key) for info in self._store.list(log))

    def _update(self, model: ServedModel, *, force: bool = False) -> None:
        """Make the pointer's pack the one that answers; on any failure everything stays as it was.

        Raises:
            ModelpressError: it can't be; also where the memory does not suffice.
        """
        with model.lock:
            if model.unloaded and not force:
                return
            number: int | None = None
            try:
                entry = self._current(model)
                number = entry.number
                if not force and _waits(model.failure, number):
                    return
                _check_newer(model, entry)
                if model.loaded and model.loaded.engine.broken:
                    model.loaded = None  # its memory is needed for the next
                trust = self._store.trust.fingerprint if self._store.trust else None
                model.loaded = Loaded(self._engine(model, entry, trust), entry, trust)
                model.newest, model.failure, model.unloaded = entry, None, False
                self._keep(model, entry)
            except MemoryError as error:
                known = ServingError(f"loading {model.name}@{model.alias}", found="not enough memory")
                self._failed(model, number, known)
                raise known from error
            except StoreUnavailableError as error:
                model.lost = model.lost or datetime.now(UTC)
                self._failed(model, number, error)
                if model.loaded is not None or not self._answer_kept(model):
                    raise
            except ModelpressError as error:
                self._failed(model, number, error)
                raise

    def _current(self, model: ServedModel) -> Pointer:
        """The newest entry of a model's pointer, as the store has it."""
        entry = pointer.current(self._store, model.name, model.alias)
        model.lost = None
        if entry is None:
            raise NotFoundError(
                f"loading {model.name}@{model.alias} from {self._store.uri}",
                found="an alias that was never set",
                fix=f"publish and promote a pack first: modelpress run, modelpress promote {model.name}",
            )
        return entry

    def _keep(self, model: ServedModel, entry: Pointer) -> None:
        """Keep what answers on this machine; once for each entry, whether the disk takes it or not."""
        if self._kept is not None and (model.kept is None or model.kept.digest != entry.digest):
            model.kept = entry
            self._kept.keep(entry)
            self._clear_up()

    def _clear_up(self) -> None:
        if self._kept is not None:
            self._kept.sweep({(model.name, model.alias) for model in self.models()})

    def _load_kept(self, model: ServedModel) -> bool:
        """Let what is kept on this machine answer, without asking the store. False: it can't."""
        with model.lock:
            model.lost = model.lost or datetime.now(UTC)
            return self._answer_kept(model)

    def _answer_kept(self, model: ServedModel) -> bool:
        if self._kept is None:
            return False
        try:
            entry = self._kept.entry(model.name, model.alias)
            if entry is None:
                return False
            store, cache = self._kept.store, self._kept.cache
            trust = store.trust.fingerprint if store.trust else None
            engine = load_engine(store, model.name, entry.pack, self._provider, self._threads, cache)
        except (ModelpressError, MemoryError) as error:
            log.error("%s@%s: what is kept on this machine is not served: %s", model.name, model.alias, error)
            return False
        model.loaded, model.newest, model.kept, model.unloaded = Loaded(engine, entry, trust), entry, entry, False
        said = "%s@%s: the store does not answer; pack %s, kept on this machine, answers (pointer %d)"
        log.warning(said, model.name, model.alias, entry.pack, entry.number)
        return True

    def _engine(self, model: ServedModel, entry: Pointer, trust: str | None) -> Engine:
        if model.loaded and model.loaded.engine.pack == entry.pack:  # and it is not broken: see `_update`
            if model.loaded.trust != trust:  # a key was revoked, or expired: then this fails, and the index tells
                load.check_trust(self._store, model.name, entry.pack)
            return model.loaded.engine
        if model.failure is None or model.failure.number != entry.number:
            self._clear_up()  # of what the last failed loads fetched; a retry finds what it fetched
        cache = self._kept.cache if self._kept else None
        engine = load_engine(self._store, model.name, entry.pack, self._provider, self._threads, cache)
        log.info("%s@%s: pack %s answers from now on (pointer %d)", model.name, model.alias, entry.pack, entry.number)
        return engine

    def _failed(self, model: ServedModel, number: int | None, error: ModelpressError) -> None:
        before = model.failure
        attempts = before.attempts + 1 if before and before.number == number else 1
        wait = min(MAX_RETRY_SECONDS, self._retry_seconds * 2.0 ** min(attempts - 1, 20))
        what = "the pointer can't be read" if number is None else f"pointer {number} can't be loaded"
        reason = f"{what}: {_public_reason(error)}"
        model.failure = Failure(number, reason, attempts, time.monotonic() + wait)
        if before is None or before.reason != reason:
            kept = f"pack {model.loaded.engine.pack[:12]} goes on answering" if model.loaded else "nothing answers"
            log.error("%s@%s: %s; %s\n  %s", model.name, model.alias, what, kept, error)


def _check_newer(model: ServedModel, entry: Pointer) -> None:
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


def _waits(failure: Failure | None, number: int) -> bool:
    return failure is not None and failure.number == number and time.monotonic() < failure.retry_at


def _public_reason(error: ModelpressError) -> str:
    """What a client may read: the errors' own texts name folders and endpoints."""
    for kind, text in _PUBLIC_REASONS:
        if isinstance(error, kind):
            return text
    return "the model does not run here"


def _index_row(model: ServedModel) -> dict[str, Any]:
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
