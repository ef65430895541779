"""Which models are served, and how each follows its alias: load beside the old, swap, let the old drain."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from modelpress import keys, load, pointer
from modelpress.errors import (
    ConfigError,
    ModelpressError,
    NotFoundError,
    ServingError,
    SetupError,
    StoreUnavailableError,
)
from modelpress.pointer import Pointer
from modelpress.store import Store
from serving.engine import Engine, load_engine
from serving.kept import Kept
from serving.models import (
    BROKEN,
    Failure,
    Loaded,
    ServedModel,
    check_newer,
    held_rows,
    index_row,
    processed_rows,
    public_reason,
    waits,
)
from serving.processed import SUFFIX, ProcessedModel
from serving.refusals import NotServedError

log = logging.getLogger("modelpress.serving")

__all__ = ["BROKEN", "CHAMPION", "MAX_HELD", "Failure", "Loaded", "Repository", "ServedModel", "index_row"]

CHAMPION = "champion"
MAX_HELD = 4
"""Packs of one model that may be held beside the one that answers: each takes its memory."""
MAX_RETRY_SECONDS = 300.0
"""Longest wait before a pack that could not be loaded is fetched again."""


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

    @property
    def store(self) -> Store:
        """The publication store."""
        return self._store

    def serves(self, name: str) -> bool:
        """Whether this server serves this name."""
        return name in self._models

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

    def asked(self, name: str) -> ServedModel | ProcessedModel:
        """The model of this name, or the one behind its processing, as a request for an answer names it.

        Raises:
            NotServedError: none.
        """
        if name.endswith(SUFFIX):
            return ProcessedModel(self.model(name.removesuffix(SUFFIX)))
        return self.model(name)

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

    def hold(self, name: str, pack: str) -> Loaded:
        """Load a pack beside the one that answers; it answers who asks for its digest, until it is released.

        Args:
            name: of a model that is served.
            pack: whole digest of one of its packs.

        Raises:
            NotServedError: this server does not serve this name.
            ConfigError: no digest, or `MAX_HELD` packs are held already.
            ModelpressError: it can't be loaded.
        """
        model = self.model(name)
        doing = f"holding a pack of {name} beside its champion"
        if not keys.is_digest(pack):
            raise ConfigError(doing, found=pack[:80], expected="a digest")
        with model.lock:
            kept = model.held.get(pack)
            if kept is not None and not kept.engine.broken:
                return kept
            others = {digest: one for digest, one in model.held.items() if digest != pack}
            if len(others) >= MAX_HELD:
                raise ConfigError(doing, found=f"{len(others)} held", expected=f"at most {MAX_HELD}", fix="release one")
            trust = self._fingerprint()
            try:
                made = Loaded(self._engine(model, pack, trust), None, trust)
            except MemoryError as error:
                raise ServingError(doing, found="not enough memory for both") from error
            model.held = {**others, pack: made}
        log.info("%s: pack %s is held", name, pack[:12])
        return made

    def release(self, name: str, pack: str) -> None:
        """Let go of a pack that is held; requests that run are answered. Nothing happens where it is not held.

        Raises:
            NotServedError: this server does not serve this name.
        """
        model = self.model(name)
        with model.lock:
            model.held = {digest: one for digest, one in model.held.items() if digest != pack}
        log.info("%s: pack %s is held no more", name, pack[:12])

    def unload(self, name: str) -> None:
        """Take a model out. Requests that run are answered.

        Raises:
            NotServedError: this server does not serve this name.
        """
        model = self.model(name)
        with model.lock:
            model.unloaded, model.loaded, model.newest, model.failure = True, None, None, None
            model.held = {}
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
        """One row per model: name, version, state and, where something is wrong, the reason; and one per pack held.

        And one for each model that can be asked with texts or images."""
        return [row for model in self.models() for row in (index_row(model), *held_rows(model), *processed_rows(model))]

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
                if not force and waits(model.failure, number):
                    return
                check_newer(model, entry)
                if model.loaded and model.loaded.engine.broken:
                    model.loaded = None  # its memory is needed for the next
                before, trust = model.loaded, self._fingerprint()
                model.loaded = Loaded(self._engine(model, entry.pack, trust), entry, trust)
                if before is None or before.engine is not model.loaded.engine:
                    which = f"{model.name}@{model.alias}"
                    log.info("%s: pack %s answers from now on (pointer %d)", which, entry.pack, entry.number)
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

    def _fingerprint(self) -> str | None:
        return self._store.trust.fingerprint if self._store.trust else None

    def _engine(self, model: ServedModel, pack: str, trust: str | None) -> Engine:
        """The engine that has this pack already, or a new one."""
        for loaded in ([model.loaded] if model.loaded else []) + list(model.held.values()):
            if loaded.engine.pack == pack and not loaded.engine.broken:
                if loaded.trust != trust:  # a key was revoked, or expired: then this fails, and the index tells
                    load.check_trust(self._store, model.name, pack)
                return loaded.engine
        if model.tried != pack:
            self._clear_up()  # of what failed loads of others fetched; a retry finds what it fetched
            model.tried = pack
        cache = self._kept.cache if self._kept else None
        return load_engine(self._store, model.name, pack, self._provider, self._threads, cache)

    def _failed(self, model: ServedModel, number: int | None, error: ModelpressError) -> None:
        model.failed_loads += 1
        before = model.failure
        attempts = before.attempts + 1 if before and before.number == number else 1
        wait = min(MAX_RETRY_SECONDS, self._retry_seconds * 2.0 ** min(attempts - 1, 20))
        what = "the pointer can't be read" if number is None else f"pointer {number} can't be loaded"
        reason = f"{what}: {public_reason(error)}"
        model.failure = Failure(number, reason, attempts, time.monotonic() + wait)
        if before is None or before.reason != reason:
            kept = f"pack {model.loaded.engine.pack[:12]} goes on answering" if model.loaded else "nothing answers"
            log.error("%s@%s: %s; %s\n  %s", model.name, model.alias, what, kept, error)
