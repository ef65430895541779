"""The receiver as an ASGI application: check, remember, hand on, answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flows.hooks.deliveries import Deliveries
from flows.hooks.signed import Delivery, RefusedError, check
from modelpress import keys, strictjson
from modelpress.errors import CorruptionError

log = logging.getLogger("modelpress.hooks")

ENTITY, ACTIONS = "model_version_alias", ("created", "deleted")
BODY_SECONDS = 10.0
"""How long a request may take to send its body."""


@dataclass(frozen=True)
class Hint:
    """Where to look."""

    name: str
    """Of a registered model."""
    delivery: str
    """MLflow's name for the event."""


class StartError(Exception):
    """Nobody could be told to look. MLflow sends the event again."""


class Looker(Protocol):
    """Who looks where an event points."""

    def look(self, hint: Hint) -> None:
        """See to it that somebody looks; returns before that is done.

        Raises:
            StartError: nobody will.
        """

    @property
    def alive(self) -> bool:
        """Whether it still does its work."""


def create_app(
    looker: Looker,
    deliveries: Deliveries,
    secrets: Sequence[bytes],
    *,
    tolerance_seconds: float,
    max_body_bytes: int,
    clock: Callable[[], float] = time.time,
) -> Starlette:
    """The application: `POST /mlflow` for MLflow, `GET /health` for who watches over it."""

    async def mlflow(request: Request) -> Response:
        try:
            body = await _body(request, max_body_bytes)
            delivery = check(request.headers, body, secrets, now=clock(), tolerance_seconds=tolerance_seconds)
            name = _model(body)
            if name is None:
                return JSONResponse({"ignored": "not about an alias of a model that can have packs"})
            await run_in_threadpool(_take, delivery, name)
        except RefusedError as refused:
            log.warning("refused a request: %d, %s", refused.status, refused.why)
            return JSONResponse({"error": refused.why}, refused.status)
        except ClientDisconnect:
            return Response(status_code=400)
        return JSONResponse({"look": name}, 202)

    def _take(delivery: Delivery, name: str) -> None:
        deliveries.take(delivery, clock())
        try:
            looker.look(Hint(name, delivery.id))
        except StartError as error:
            deliveries.forget(delivery)  # MLflow's repeat carries the same id
            raise RefusedError(503, str(error)) from error
        log.info("an alias of %s was set or deleted", name)

    async def health(_request: Request) -> Response:
        return JSONResponse({"alive": looker.alive}, 200 if looker.alive else 503)

    return Starlette(routes=[Route("/mlflow", mlflow, methods=["POST"]), Route("/health", health)])


async def _body(request: Request, most: int) -> bytes:
    """The body, never more of it than `most`, and not for ever.

    Raises:
        RefusedError: it is larger, or slow.
    """
    announced = request.headers.get("content-length", "")
    size, chunks = int(announced) if announced.isdecimal() and len(announced) < 20 else 0, []
    try:
        async with asyncio.timeout(BODY_SECONDS):
            if size <= most:
                size = 0
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > most:
                        break
                    chunks.append(chunk)
    except TimeoutError as error:
        raise RefusedError(408, f"the body took more than {BODY_SECONDS:.0f} s") from error
    if size > most:
        raise RefusedError(413, f"the body is larger than {most} bytes")
    return b"".join(chunks)


def _model(body: bytes) -> str | None:
    """Name of the registered model whose alias an event is about; None for an event of another kind, or of a model
    that no pack can be called like.

    Raises:
        RefusedError: the body is no event at all, though MLflow signed it.
    """
    try:
        event: dict[str, Any] = strictjson.loads(body, "reading an event of MLflow's")
    except CorruptionError as error:
        raise RefusedError(400, f"no event: {error.found}") from error
    if event.get("entity") != ENTITY or event.get("action") not in ACTIONS:
        return None
    data = event.get("data")
    name = data.get("name") if isinstance(data, dict) else None
    if not isinstance(name, str):
        raise RefusedError(400, "an event about an alias without the model's name")
    return name if keys.is_name(name) else None
