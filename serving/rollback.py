"""Going back over HTTP: `POST /v2/repository/models/{name}/rollback`, for keys with the scope `promote`.

It appends to the pointer's log, as `modelpress rollback` does, and loads what it names. It is off unless it is switched
on, since the server's credentials then must be able to write pointers. MLflow's alias follows by `reconcile`. There is
no promotion here: a promotion is judged, and the gate needs MLflow.
"""

from __future__ import annotations

import asyncio
import logging
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import orjson
from starlette.requests import Request
from starlette.responses import Response

from modelpress import pointer
from modelpress.access import Principal
from modelpress.errors import (
    AccessDeniedError,
    ConflictError,
    CorruptionError,
    ModelpressError,
    StoreUnavailableError,
    TrustError,
)
from modelpress.store.threads import DaemonPool
from serving.guard import AUDITED, PRINCIPAL
from serving.keyring import ForbiddenError
from serving.refusals import NotReadyError, NotServedError, RequestError, TooLargeError, one_line
from serving.repository import Repository

log = logging.getLogger("modelpress.serving")

PATH = "/v2/repository/models/{name}/rollback"
MAX_BODY_BYTES = 2**12
DIGEST = re.compile(r"[0-9a-f]{64}")
TOKEN = re.compile(r"[A-Za-z0-9_-]{8,64}")

_WHY: list[tuple[type[ModelpressError], str, str]] = [
    (AccessDeniedError, "the server's credentials may only read the store", "credentials that may write pointers"),
    (StoreUnavailableError, "the store does not answer", "another try later"),
    (TrustError, "the server has no key that may sign pointers, or the pack is not signed", "a trusted key"),
    (CorruptionError, "the pointer's log is damaged", "a look at it: modelpress history"),
]


class ElsewhereError(RequestError):
    """The pointer does not stand where the request takes it to stand, or can't go where it asks."""

    status: ClassVar[int] = 409


@dataclass(frozen=True)
class Asked:
    """What the body says, all of it optional."""

    to: str | None = None
    """Digest of the pack to go back to, one that this alias named before. None: the one before the current."""
    expected: str | None = None
    """`from`: the pack that the asker sees as current. If another is, nothing is done: a page may be old."""
    token: str | None = None
    """Names the attempt: a retry that carries it goes no further back."""

    @classmethod
    def read(cls, body: bytes) -> Self:
        """
        Raises:
            RequestError: it is something else.
        """
        try:
            document = orjson.loads(body) if body.strip() else {}
        except orjson.JSONDecodeError as error:
            raise RequestError("body", found=str(error), expected="a JSON object, or nothing") from error
        legal = {"to": DIGEST, "from": DIGEST, "token": TOKEN}
        if not isinstance(document, dict) or not document.keys() <= legal.keys():
            raise RequestError("body", found="something else", expected=f"an object of {', '.join(legal)}")
        for name, value in document.items():
            if not isinstance(value, str) or not legal[name].fullmatch(value):
                raise RequestError(f"body: {name}", found="another value", expected=f"text like {legal[name].pattern}")
        return cls(document.get("to"), document.get("from"), document.get("token"))


class Rollback:
    """The door.

    Args:
        repository: what is served.
        enabled: whether it opens.
    """

    def __init__(self, repository: Repository, enabled: bool) -> None:
        self._repository, self.enabled = repository, enabled
        # The store may be silent for minutes: neither requests nor the end of the process wait for it.
        self._pool = DaemonPool(1, "rollback")

    async def endpoint(self, request: Request) -> Response:
        """`POST` with a body as `Asked` reads it; answers with what the pointer names now, and what answers."""
        principal: Principal = request.scope[PRINCIPAL]
        if not self.enabled:
            found = "it switched off on this server"
            raise ForbiddenError("rolling back over HTTP", found=found, expected="MODELPRESS_SERVING_ROLLBACK=true")
        if principal.via == "nobody":
            raise ForbiddenError("rolling back over HTTP", found="no key", expected="one with the scope promote")
        asked = Asked.read(await _body(request))
        name, notes = request.path_params["name"], request.scope[AUDITED]
        try:
            work = lambda: self._go_back(name, asked, principal, notes)  # noqa: E731
            answer = await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except RequestError as error:
            notes["why"] = one_line(error)
            raise
        return Response(orjson.dumps(answer), media_type="application/json", headers={"Cache-Control": "no-store"})

    def _go_back(self, name: str, asked: Asked, principal: Principal, notes: dict[str, Any]) -> dict[str, Any]:
        model = self._repository.model(name)
        if not self._repository.serves(name):  # a second name of a model is no pointer's
            raise NotServedError("model", found=name[:80], expected="the name of a pack")
        try:
            entry, before = self._append(name, model.alias, asked, principal)
        except ConflictError as error:
            found = "somebody moved it meanwhile"
            raise ElsewhereError(f"model {name!r}: pointer", found=found, expected="another look") from error
        except ModelpressError as error:
            if isinstance(error, RequestError):
                raise
            log.error("rolling back %s@%s for %s: %s", name, model.alias, principal.name, error)
            raise _told(name, error) from error
        notes.update(pack=entry.pack, before=before, pointer=entry.number)
        log.info("%s rolled %s@%s back to pack %s", principal.name, name, model.alias, entry.pack)
        if not model.unloaded:
            try:
                self._repository.load(name)
            except ModelpressError as error:  # told by the index, and tried again by the poll
                log.error("loading what %s was rolled back to: %s", name, error)
        loaded = model.loaded
        return {
            "name": name,
            "alias": model.alias,
            "pack": entry.pack,
            "pointer": entry.number,
            "before": before,
            "answers": loaded.engine.pack if loaded else None,
        }

    def _append(self, name: str, alias: str, asked: Asked, principal: Principal) -> tuple[pointer.Pointer, str | None]:
        """The entry, and the pack that stood before it.

        Raises:
            ElsewhereError: nothing is done.
            ModelpressError: see `pointer.append`.
        """
        entries = pointer.history(self._repository.store, name, alias)
        for number, entry in enumerate(entries):
            if asked.token is not None and entry.token == asked.token:
                return entry, entries[number - 1].pack if number else None
        where, back = f"model {name!r}: pointer", pointer.standing(entries)
        current = entries[-1].pack if entries else None
        if asked.expected is not None and asked.expected != current:
            raise ElsewhereError(where, found=f"pack {current}", expected=f"pack {asked.expected}, as the request says")
        if asked.to is None and len(back) < 2:
            raise ElsewhereError(where, found="nothing before what stands", expected="an earlier pack to go back to")
        to = asked.to or back[-2]
        if to == current or to not in {entry.pack for entry in entries}:
            # Another pack would come past the gate.
            raise ElsewhereError(f"{where}: to", found=f"pack {to}", expected="one that stood before, and not now")
        by = f"{principal.name} ({principal.via} {principal.id}".rstrip() + ")"
        store, after = self._repository.store, len(entries)
        made = pointer.append(store, name, alias, to, pointer.ROLLBACK, after=after, token=asked.token, by=by)
        return made, current


async def _body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise TooLargeError("body", found=f"more than {MAX_BODY_BYTES} bytes", expected="a small JSON object")
    return body


def _told(name: str, error: ModelpressError) -> NotReadyError:
    """What the operator must mend, by kind: the errors' own texts name folders and endpoints."""
    known = (why for kind, *why in _WHY if isinstance(error, kind))
    found, expected = next(known, [type(error).__name__, "a look at the server's log"])
    expected = f"{expected} (or `modelpress rollback {name}`)"
    return NotReadyError(f"rolling back {name!r}", found=found, expected=expected)
