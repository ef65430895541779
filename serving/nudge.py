"""The door for nudges: somebody who has the secret says that a pointer moved, and it is looked at now."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import ClassVar, Self

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from modelpress.errors import ModelpressError
from modelpress.nudge import MAX_BODY_BYTES, PATH, TOLERANCE_SECONDS, Nudge, RefusedNudgeError, check
from serving.refusals import BusyError, RequestError, SlowBodyError, TooLargeError
from serving.repository import Repository

log = logging.getLogger("modelpress.serving")

BODY_SECONDS = 5.0
ROUND_SECONDS = 1.0
"""From one round of looks to the next, at least: many nudges are one look."""
MAX_WAITING = 1000
"""Models that wait to be looked at; nudges for more are refused."""
MAX_SEEN = 100_000
"""Nudges that are remembered, so that none counts twice; more within `TOLERANCE_SECONDS` are refused."""

Listener = Callable[[Nudge], None]
"""Is told of each nudge, in the thread that looks, before the look."""


class UnsignedNudgeError(RequestError):
    """Nobody who has the secret sent it."""

    status: ClassVar[int] = 401


class ReplayedNudgeError(RequestError):
    """It came before."""

    status: ClassVar[int] = 409


class ManyNudgesError(BusyError):
    """More than this server remembers."""


class Nudges:
    """Takes nudges, and looks where they point: the first at once, then in rounds, each model once a round.

    Entering it starts the thread that looks; leaving it asks the thread to end, and waits for nothing.

    Args:
        repository: what is served.
        secrets: any of them may have signed; none refuses all.
        listeners: told of each nudge.
        clock: seconds since 1970.
        round_seconds: see `ROUND_SECONDS`.
    """

    def __init__(
        self,
        repository: Repository,
        secrets: Sequence[bytes],
        listeners: Sequence[Listener] = (),
        *,
        clock: Callable[[], float] = time.time,
        round_seconds: float = ROUND_SECONDS,
    ) -> None:
        self._repository, self._secrets, self._listeners = repository, list(secrets), list(listeners)
        self._clock, self._round = clock, round_seconds
        self._seen: dict[str, int] = {}
        """When each was sent, by id, as they came."""
        self._waiting: dict[str, Nudge] = {}
        """By model, as they came; the newest of each."""
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nudged", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        with self._changed:
            self._changed.notify()

    def route(self) -> Route:
        """The door."""
        return Route(PATH, self._endpoint, methods=["POST"])

    def listen(self, listener: Listener) -> None:
        """Tell one more of each nudge; before the start."""
        self._listeners.append(listener)

    def take(self, headers: dict[str, str], body: bytes) -> Nudge:
        """Check a nudge, and let the thread look.

        Raises:
            UnsignedNudgeError: it is not signed, or too old.
            ReplayedNudgeError: it came before.
            ManyNudgesError: too many came.
            NotServedError: this server does not serve that model.
        """
        try:
            nudge = check(headers, body, self._secrets, now=self._clock())
        except RefusedNudgeError as error:
            raise UnsignedNudgeError("nudge", found=error.found, expected=error.expected) from error
        self._repository.check_may_serve(nudge.name)
        with self._changed:
            self._note(nudge)
            if len(self._waiting) >= MAX_WAITING and nudge.name not in self._waiting:
                raise ManyNudgesError("nudge", found=f"{MAX_WAITING} models that wait to be looked at")
            self._waiting[nudge.name] = nudge
            self._changed.notify()
        return nudge

    def _note(self, nudge: Nudge) -> None:
        now = self._clock()
        # Twice the time: a clock ahead of ours signs in our future.
        for old in [known for known, sent in self._seen.items() if sent < now - 2 * TOLERANCE_SECONDS]:
            del self._seen[old]
        if nudge.id in self._seen:
            raise ReplayedNudgeError("nudge", found="one that came before", expected="each once")
        if len(self._seen) >= MAX_SEEN:
            raise ManyNudgesError("nudge", found=f"{MAX_SEEN} in {TOLERANCE_SECONDS:.0f} s")
        self._seen[nudge.id] = nudge.sent

    async def _endpoint(self, request: Request) -> Response:
        try:
            body = await _body(request)
            nudge = self.take(dict(request.headers), body)
        except ClientDisconnect:
            return Response(status_code=400)
        return Response(orjson.dumps({"look": nudge.name}), 202, media_type="application/json")

    def _run(self) -> None:
        while not self._stopped.is_set():
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopped.is_set())
                round_, self._waiting = self._waiting, {}
            for nudge in round_.values():
                if self._stopped.is_set():
                    return
                log.info("nudged to look at %s@%s", nudge.name, nudge.alias)
                self._tell(nudge)
                self._repository.look(nudge.name)
            self._stopped.wait(self._round)

    def _tell(self, nudge: Nudge) -> None:
        for listener in self._listeners:
            try:
                listener(nudge)
            except ModelpressError as error:
                log.warning("a nudge of %s was of no use: %s", nudge.name, error)


async def _body(request: Request) -> bytes:
    """The body, never more of it than a nudge has, and not for ever."""
    chunks, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size > MAX_BODY_BYTES:
                    raise TooLargeError("body", found=f"{size} bytes or more", expected=f"at most {MAX_BODY_BYTES}")
                chunks.append(chunk)
    except TimeoutError as error:
        raise SlowBodyError("body", found=f"a part of it in {BODY_SECONDS:.0f} s", expected="all of it") from error
    return b"".join(chunks)
