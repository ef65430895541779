"""Canaries on a server: which requests a candidate gets, what is counted, and when it gets no more.

A thread follows the log of each model's canary (`modelpress.canary.log`), loads the candidate beside the champion, and
writes what was counted. Requests look at one object, once. A candidate is asked only while it can be told what came of
it: where the store can't be reached, or the tally not be written, the champion answers everything until it can.

Each request is dealt by a coin of its own, thrown here: that is what the tests rest on. A client that wants always the
same model sends the header `modelpress-canary-key`; then the coin is the key's.
"""

from __future__ import annotations

import hashlib
import logging
import random
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelpress.canary import log as canary_log
from modelpress.canary import tally
from modelpress.canary.log import CanaryState
from modelpress.canary.tally import Condition
from modelpress.errors import AccessDeniedError, ModelpressError, ServingError, StoreUnavailableError
from modelpress.store import Store
from serving.counting import Counter, shown
from serving.engine import Engine
from serving.mirror import Mirror, Mirrored, finite
from serving.refusals import RequestError
from serving.repository import Loaded, Repository, ServedModel

log = logging.getLogger("modelpress.serving")

REPORT_SECONDS = 5.0
"""How often a tally is written at most, but for the news that a server stopped."""
SILENT_SECONDS = 60.0
"""A server that could not read the log for so long, or say what it counts, sends nothing to a candidate."""
TAKES_OTHERS = "it takes, or gives, other tensors than the champion"

Outputs = dict[str, np.ndarray]
Run = Callable[[Engine], Awaitable[Outputs]]


class Trial:
    """One canary of one model on this server."""

    def __init__(self, model: ServedModel, state: CanaryState, server: str, mirror: Mirror) -> None:
        self.model, self.state, self.server = model, state, server
        self.mirror, self.counter = mirror, Counter(state.config)
        self.candidate: Loaded | None = None
        """None until it is loaded."""
        self.stopped: str | None = None
        """Why this server sends it nothing any more."""
        self.read_at = self.told_at = time.monotonic()
        """When the log was read last, and when nothing was left to be told."""
        self.written_version, self.written_at = -1, float("-inf")
        self.written_condition: Condition | None = None

    @property
    def condition(self) -> Condition:
        """For the tally."""
        return "stopped" if self.stopped else "taking part" if self.candidate else "loading"

    def stop(self, reason: str) -> None:
        """Send the candidate nothing from now on."""
        if self.stopped is None:
            self.stopped = reason[: tally.MAX_REASON]
            log.error("%s: the canary of pack %s stops here: %s", self.model.name, self.state.candidate[:12], reason)

    def turn(self, champion: Loaded, key: str | None) -> Turn | None:
        """A request's part in this; None: it has none, and the champion answers."""
        candidate, state = self.candidate, self.state
        if candidate is None or self.stopped or champion.engine.pack != state.champion:
            return None
        if time.monotonic() - min(self.read_at, self.told_at) > SILENT_SECONDS:
            return None
        if candidate.engine.broken:
            self.stop("its execution provider failed")
            return None
        chosen = _coin(state.id, key) < state.now.share
        return Turn(self, state, champion, candidate, chosen)

    def answered(self, step: int, *, candidate: bool, seconds: float | None) -> None:
        """Count an answer, or None for an error."""
        if reason := self.counter.answered(step, candidate=candidate, seconds=seconds):
            self.stop(reason)

    def compared(self, step: int, disagreement: float) -> None:
        """Count a mirrored request."""
        if reason := self.counter.mirrored(step, disagreement):
            self.stop(reason)


@dataclass(frozen=True)
class Turn:
    """One request of a canary: what was decided for it stays so, whatever is swapped meanwhile."""

    trial: Trial
    state: CanaryState
    champion: Loaded
    candidate: Loaded
    chosen: bool
    """Whether the coin fell for the candidate."""

    async def run(self, run: Run, inputs: Outputs, outputs: list[str]) -> tuple[Loaded, Outputs]:
        """The answer, and who gave it.

        A request that the candidate fails on is answered by the champion. What the champion refuses too was the
        request's own fault, and counts for nobody.

        Raises:
            RequestError: the champion's.
        """
        if self.chosen and self.state.now.mode == "canary":
            answers = await self._ask_candidate(run, outputs)
            if answers is not None:
                return self.candidate, answers
            return self.champion, await self._make_up(run, outputs)
        answers = await self._ask_champion(run)
        if self.chosen:
            self._mirror(inputs, answers)
        return self.champion, answers

    async def _ask_candidate(self, run: Run, outputs: list[str]) -> Outputs | None:
        started = time.perf_counter()
        try:
            answers = await run(self.candidate.engine)
        except ServingError as error:
            log.warning("pack %s failed on a request: %s", self.state.candidate[:12], error)
            return None
        if not finite(answers, outputs):
            return None
        self.trial.answered(self.state.step, candidate=True, seconds=time.perf_counter() - started)
        return answers

    async def _make_up(self, run: Run, outputs: list[str]) -> Outputs:
        try:
            answers = await run(self.champion.engine)
        except RequestError as error:
            if _is_ours(error):  # it might have answered: the candidate's failure stands
                self.trial.answered(self.state.step, candidate=True, seconds=None)
            raise
        if finite(answers, outputs):
            self.trial.answered(self.state.step, candidate=True, seconds=None)
        return answers

    async def _ask_champion(self, run: Run) -> Outputs:
        started = time.perf_counter()
        deals = self.state.now.mode == "canary"
        try:
            answers = await run(self.champion.engine)
        except RequestError as error:
            if deals and _is_ours(error):
                self.trial.answered(self.state.step, candidate=False, seconds=None)
            raise
        seconds = time.perf_counter() - started
        if deals:
            self.trial.answered(self.state.step, candidate=False, seconds=seconds)
        return answers

    def _mirror(self, inputs: Outputs, answers: Outputs) -> None:
        config, step, trial = self.state.config, self.state.step, self.trial

        def done(share: float) -> None:
            trial.compared(step, share)

        offered = Mirrored(self.candidate.engine, inputs, answers, config.compare, config.tolerance, done)
        if not trial.mirror.offer(offered):
            trial.counter.dropped(step)


class Canaries:
    """The canaries of all models of a server."""

    def __init__(self, store: Store, repository: Repository, poll_seconds: float) -> None:
        """
        Args:
            store: the publication store.
            repository: what is served.
            poll_seconds: how often the logs are read; 0 never: then there is no canary here.
        """
        self._store, self._repository, self._seconds = store, repository, poll_seconds
        self._server, self._mirror = uuid.uuid4().hex, Mirror()
        self._trials: dict[str, Trial] = {}
        self._said: dict[str, str] = {}
        self._stopped, self._wanted = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._follow, name="canary", daemon=True)

    def start(self) -> None:
        """Begin to follow the logs."""
        if self._seconds:
            self._mirror.start()
            self._thread.start()

    def stop(self) -> None:
        """End, and say what was counted; a store that hangs is not waited for long."""
        self._stopped.set()
        self._wanted.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2.0)
        self._mirror.stop()

    def look_soon(self) -> None:
        """Look at the logs at once, and not at the next poll: somebody says that one has changed."""
        self._wanted.set()

    def turn(self, model: ServedModel, champion: Loaded, key: str | None = None) -> Turn | None:
        """A request's part in a canary of its model; None: it has none.

        Args:
            model: that is asked, for no version in particular.
            champion: what answers for it at this moment.
            key: that the client sent to get always the same model.
        """
        trial = self._trials.get(model.name)
        return trial.turn(champion, key) if trial is not None else None

    def shown(self, name: str) -> dict[str, object] | None:
        """The canary of a model, for its metadata; None: none."""
        trial = self._trials.get(name)
        return shown(trial.state, trial.stopped) if trial is not None else None

    def trials(self) -> list[Trial]:
        """The canaries that this server has a part in, by name of the model."""
        return [trial for _, trial in sorted(self._trials.copy().items())]

    def poll(self) -> None:
        """Look at every log once, load or let go, and write what was counted. What fails is logged, never raised."""
        for model in self._repository.models():
            try:
                self._look(model)
                self._said.pop(model.name, None)
            except ModelpressError as error:
                self._say(model.name, f"following the canary of {model.name}: {error}")
            if (trial := self._trials.get(model.name)) is not None:
                self._report(trial)

    def _follow(self) -> None:
        while True:
            self._wanted.wait(self._seconds)
            self._wanted.clear()
            if self._stopped.is_set():
                break
            self.poll()
        for trial in self._trials.values():
            self._report(trial, at_once=True)

    def _look(self, model: ServedModel) -> None:
        standing = canary_log.current(self._store, model.name, model.alias)
        state = standing.state if standing is not None and standing.running else None
        trial = self._trials.get(model.name)
        if trial is not None and (state is None or state.id != trial.state.id):
            if standing is not None and standing.state.phase == "promoted" and _stands(model, trial.state.champion):
                return  # the pointer's poll takes over what is loaded, and would load it again if it were let go now
            self._drop(trial)
            trial = None
        if state is None or model.loaded is None:
            return
        if trial is None:
            if model.loaded.engine.pack != state.champion:
                return  # the pointer was moved, or this server has not followed it yet
            trial = self._trials[model.name] = Trial(model, state, self._server, self._mirror)
        trial.state, trial.read_at = state, time.monotonic()
        if trial.candidate is None and not trial.stopped:
            self._load(trial)

    def _load(self, trial: Trial) -> None:
        """Load the candidate; what a later try may mend is tried again at the next poll."""
        name, pack, champion = trial.model.name, trial.state.candidate, trial.model.loaded
        self._report(trial, at_once=True)  # no request goes to it before this server is known to be able to tell
        if trial.stopped or champion is None:
            return
        try:
            loaded = self._repository.hold(name, pack)
        except StoreUnavailableError:
            raise
        except ModelpressError as error:
            log.error("%s: the candidate %s can't be loaded: %s", name, pack[:12], error)
            trial.stop(f"it can't be loaded here ({type(error).__name__})")
            return
        if _signature(loaded.engine) != _signature(champion.engine):
            trial.stop(TAKES_OTHERS)
        trial.candidate = loaded

    def _drop(self, trial: Trial) -> None:
        self._report(trial, at_once=True)
        self._trials.pop(trial.model.name, None)
        self._repository.release(trial.model.name, trial.state.candidate)
        log.info("%s: the canary of pack %s is over", trial.model.name, trial.state.candidate[:12])

    def _report(self, trial: Trial, *, at_once: bool = False) -> None:
        """Write the tally, if it says something new and the last one is some time ago."""
        version, condition, now = trial.counter.version, trial.condition, time.monotonic()
        same = (version, condition) == (trial.written_version, trial.written_condition)
        if same:
            trial.told_at = now
            return
        news = at_once or condition != trial.written_condition
        if not (news or now - trial.written_at >= REPORT_SECONDS):
            return
        more: dict[str, Any] = {"reason": trial.stopped or "", "slow_seconds": trial.counter.slow_seconds}
        made = tally.new(trial.state.id, trial.server, condition, trial.counter.tallies(), **more)
        try:
            tally.write(self._store, trial.model.name, made)
        except AccessDeniedError as error:
            trial.stop("this server may not write what it counts: infra/s3/policies/server.json")
            self._say(trial.model.name, str(error))
        except ModelpressError as error:
            self._say(trial.model.name, f"writing what was counted of the canary of {trial.model.name}: {error}")
        else:
            trial.written_version, trial.written_condition = version, condition
            trial.written_at = trial.told_at = now

    def _say(self, name: str, text: str) -> None:
        """Log something once, not at each poll."""
        if self._said.get(name) != text:
            self._said[name] = text
            log.warning("%s", text)


def _coin(canary: str, key: str | None) -> float:
    """A number in [0, 1): a new one for each request, or always the same for a key."""
    if key is None:
        return random.random()
    digest = hashlib.blake2b(f"{canary}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _is_ours(error: RequestError) -> bool:
    """Whether a request failed for what is no fault of its own: the machine, or time that ran out."""
    return error.status >= 500


def _stands(model: ServedModel, pack: str) -> bool:
    return model.loaded is not None and model.loaded.engine.pack == pack


def _signature(engine: Engine) -> tuple[Any, ...]:
    return tuple([spec.to_json() for spec in specs] for specs in (engine.inputs, engine.outputs))
