"""What the doors that move pointers share: the body, the one thread, and how the store's troubles are told."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

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
from serving.models import ServedModel
from serving.refusals import NotReadyError, NotServedError, RequestError, TooLargeError, one_line
from serving.repository import Repository

log = logging.getLogger("modelpress.serving")

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
class Moved:
    """What a door did."""

    entry: pointer.Pointer
    """That stands now."""
    before: str | None
    """Digest of the pack that stood before it."""


@dataclass(frozen=True)
class Mover:
    """A door that appends to pointers' logs, and lets what they name then answer.

    Args:
        repository: what is served.
        enabled: whether it opens.
        setting: that opens it, in capitals.
        doing: what it does, for messages.
        command: of the command line that does the same.
    """

    repository: Repository
    enabled: bool
    setting: str
    doing: str
    command: str
    # The store may be silent for minutes: neither requests nor the end of the process wait for it.
    pool: DaemonPool

    async def answer(
        self,
        request: Request,
        legal: Mapping[str, re.Pattern[str]],
        move: Callable[[ServedModel, dict[str, str], str], Moved],
    ) -> Response:
        """Let a request in, if its sender may and its body is legal; answers with what the pointer names then.

        Args:
            request: of a principal that the guard found.
            legal: fields that the body may have, all text, and what each must look like.
            move: appends, given the model, the body's fields and who asks.

        Raises:
            RequestError: nothing was moved.
        """
        principal: Principal = request.scope[PRINCIPAL]
        if not self.enabled:
            expected = f"MODELPRESS_SERVING_{self.setting}=true"
            raise ForbiddenError(f"{self.doing} over HTTP", found="it switched off on this server", expected=expected)
        if principal.via == "nobody":
            raise ForbiddenError(f"{self.doing} over HTTP", found="no key", expected="one with the scope promote")
        asked = _fields(await _body(request), legal)
        name, notes = request.path_params["name"], request.scope[AUDITED]
        try:
            work = lambda: self._work(name, principal, notes, lambda model, by: move(model, asked, by))  # noqa: E731
            answer = await asyncio.get_running_loop().run_in_executor(self.pool, work)
        except RequestError as error:
            notes["why"] = one_line(error)
            raise
        return Response(orjson.dumps(answer), media_type="application/json", headers={"Cache-Control": "no-store"})

    def _work(
        self, name: str, principal: Principal, notes: dict[str, Any], move: Callable[[ServedModel, str], Moved]
    ) -> dict[str, Any]:
        model = self.repository.model(name)
        if not self.repository.serves(name):  # a second name of a model is no pointer's
            raise NotServedError("model", found=name[:80], expected="the name of a pack")
        by = f"{principal.name} ({principal.via} {principal.id}".rstrip() + ")"
        try:
            moved = move(model, by)
        except ConflictError as error:
            found = "somebody moved it meanwhile"
            raise ElsewhereError(f"model {name!r}: pointer", found=found, expected="another look") from error
        except ModelpressError as error:
            if isinstance(error, RequestError):
                raise
            log.error("%s %s@%s for %s: %s", self.doing, name, model.alias, principal.name, error)
            raise self._told(name, error) from error
        entry = moved.entry
        notes.update(pack=entry.pack, before=moved.before, pointer=entry.number)
        log.info("%s %s@%s for %s: pack %s", self.doing, name, model.alias, principal.name, entry.pack)
        self._follow(model)
        loaded = model.loaded
        return {
            "name": name,
            "alias": model.alias,
            "pack": entry.pack,
            "pointer": entry.number,
            "before": moved.before,
            "answers": loaded.engine.pack if loaded else None,
        }

    def _follow(self, model: ServedModel) -> None:
        if model.unloaded:
            return
        try:
            self.repository.load(model.name)
        except ModelpressError as error:  # told by the index, and tried again by the poll
            log.error("loading what %s was moved to: %s", model.name, error)

    def _told(self, name: str, error: ModelpressError) -> NotReadyError:
        """What the operator must mend, by kind: the errors' own texts name folders and endpoints."""
        known = (why for kind, *why in _WHY if isinstance(error, kind))
        found, expected = next(known, [type(error).__name__, "a look at the server's log"])
        expected = f"{expected} (or `modelpress {self.command} {name}`)"
        return NotReadyError(f"{self.doing} {name!r}", found=found, expected=expected)


def retried(entries: list[pointer.Pointer], token: str | None) -> Moved | None:
    """What an earlier attempt of this token did; None: there was none."""
    for number, entry in enumerate(entries):
        if token is not None and entry.token == token:
            return Moved(entry, entries[number - 1].pack if number else None)
    return None


def check_current(where: str, entries: list[pointer.Pointer], expected: str | None) -> str | None:
    """Digest of the pack that stands; None: the alias was never set.

    Raises:
        ElsewhereError: it is another than the asker takes it for: a page may be old.
    """
    current = entries[-1].pack if entries else None
    if expected is not None and expected != current:
        raise ElsewhereError(where, found=f"pack {current}", expected=f"pack {expected}, as the request says")
    return current


def _fields(body: bytes, legal: Mapping[str, re.Pattern[str]]) -> dict[str, str]:
    try:
        document = orjson.loads(body) if body.strip() else {}
    except orjson.JSONDecodeError as error:
        raise RequestError("body", found=str(error), expected="a JSON object, or nothing") from error
    if not isinstance(document, dict) or not document.keys() <= legal.keys():
        raise RequestError("body", found="something else", expected=f"an object of {', '.join(legal)}")
    for name, value in document.items():
        if not isinstance(value, str) or not legal[name].fullmatch(value):
            raise RequestError(f"body: {name}", found="another value", expected=f"text like {legal[name].pattern}")
    return document


async def _body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise TooLargeError("body", found=f"more than {MAX_BODY_BYTES} bytes", expected="a small JSON object")
    return body
