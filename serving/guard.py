"""Before the application: who asks, whether they may, what is written down of it, and how long it took."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import orjson
from starlette.responses import Response

from modelpress.access import Principal
from serving.infer import TENANT
from serving.keyring import CHALLENGE, NOBODY, ForbiddenError, Keyring, UnauthenticatedError
from serving.refusals import RequestError, one_line
from serving.scopes import ACTIONS, Door, Doors

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.types import Message, Receive, Scope, Send

    from serving.audit import Audit
    from serving.metrics import Metrics
    from serving.tracing import Traces

PRINCIPAL, AUDITED = "modelpress.principal", "modelpress.audited"
"""Where the ASGI scope has who asks, and what a door adds to its line in the audit (a dictionary)."""
CLOSED_BY_CLIENT = 499
NOT_READ = {"Connection": "close"}
"""A request that is refused is not read, so nothing can come behind it."""


class Guard:
    """The application with a door-keeper, as ASGI. Refusals come before anything of a request is read.

    Args:
        app: the application; each of its routes must be in `serving.scopes.NEEDS`.
        keyring: who counts.
        audit: what is written down, and where.
        metrics: what is counted.
        traces: where spans go; None: nowhere.
    """

    def __init__(
        self, app: Starlette, keyring: Keyring, audit: Audit, metrics: Metrics, traces: Traces | None = None
    ) -> None:
        self._app, self._keyring = app, keyring
        self._audit, self._metrics, self._traces = audit, metrics, traces
        self._doors = Doors(app.routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # nothing else is spoken here
        door, visit = self._doors.find(scope["path"]), Visit(send)
        self._metrics.began(door.path)
        try:
            if self._traces is None:
                await self._answer(scope, receive, visit, door)
            else:
                with self._traces.request(scope, door, visit):
                    await self._answer(scope, receive, visit, door)
        finally:
            seconds = time.perf_counter() - visit.began
            self._metrics.answered(door.path, door.parameters.get("name"), visit.status, seconds)

    async def _answer(self, scope: Scope, receive: Receive, visit: Visit, door: Door) -> None:
        try:
            principal = self._check(scope, door)
        except RequestError as error:
            await self._refuse(scope, receive, visit.send, error)
            return
        scope[PRINCIPAL], scope[TENANT], scope[AUDITED] = principal, principal.name, {}
        try:
            await self._app(scope, receive, visit.send)
        finally:
            if door.path in ACTIONS:
                self._write_down(scope, visit, door, principal)

    def _write_down(self, scope: Scope, visit: Visit, door: Door, principal: Principal) -> None:
        if door.needs is None and visit.status >= 400:  # whoever comes along may ask: they must not fill the disk
            why = "refused behind a door that is open"
            self._audit.refused(address(scope), scope["method"], scope["path"], visit.status, why)
            return
        model = door.parameters.get("name")
        self._audit.done(principal, ACTIONS[door.path], address(scope), model, visit.status, scope[AUDITED])

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, error: RequestError) -> None:
        headers = NOT_READ | ({"WWW-Authenticate": CHALLENGE} if isinstance(error, UnauthenticatedError) else {})
        text, who = one_line(error), error.who if isinstance(error, ForbiddenError) else ""
        self._audit.refused(address(scope), scope["method"], scope["path"], error.status, text, who)
        answer = Response(orjson.dumps({"error": text}), error.status, headers, media_type="application/json")
        await answer(scope, receive, send)

    def _check(self, scope: Scope, door: Door) -> Principal:
        """
        Raises:
            UnauthenticatedError, ForbiddenError: they may not come in.
        """
        if door.needs is None:
            return NOBODY
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) > 1 and not self._keyring.is_open:
            raise UnauthenticatedError("this request brings several keys", expected="one")
        if self._keyring.is_open and _from_another_page(scope):
            raise ForbiddenError("a page of another site asks", expected="a key, on a server that others' pages reach")
        authorization = given[0].decode("latin-1") if given else None
        return self._keyring.check(authorization, *door.needs, model=door.parameters.get("name"))


class Visit:
    """How a request went."""

    def __init__(self, send: Send) -> None:
        self.began = time.perf_counter()
        self.status = CLOSED_BY_CLIENT
        """Until there is an answer."""
        self._send = send

    async def send(self, message: Message) -> None:
        """Pass it on, and look at the status."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)


def address(scope: Scope) -> str:
    """Where a request comes from, as far as the server knows (a proxy on loopback is believed)."""
    client = scope.get("client")
    return str(client[0]) if client else ""


def _from_another_page(scope: Scope) -> bool:
    """Whether a browser says that it asks for a page of elsewhere: where nobody brings a key, a page could act as the
    one who looks at it."""
    return any(
        name == b"sec-fetch-site" and value.lower() not in (b"same-origin", b"none") for name, value in scope["headers"]
    )
