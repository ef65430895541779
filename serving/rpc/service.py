"""The gRPC server: it lives in the event loop of REST's, and answers by the same `Inference`, places and limits.

grpcio reads a message before anybody can refuse it. So the number of calls at a time is bounded by the places, with a
few more for health, and a message by the cap on bodies; who comes on top gets RESOURCE_EXHAUSTED from grpcio itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from modelpress import __version__
from modelpress.errors import ModelpressError, SetupError
from serving.infer import CANARY_KEY, CLOSED_BY_CLIENT, Inference
from serving.keyring import NOBODY, ForbiddenError
from serving.metadata import described
from serving.refusals import RETRY_SECONDS, UNFORESEEN, NotReadyError, RequestError, one_line, told
from serving.rpc import tensors
from serving.rpc.messages import METHODS, SERVICE
from serving.rpc.tls import credentials
from serving.scopes import ANY, EVERYBODY, USERS, Needs
from serving.tracing import CARRIED

if TYPE_CHECKING:
    from modelpress.access import Principal
    from serving.tls import Certificate
    from serving.watch import Watch

log = logging.getLogger("modelpress.serving")

CALLS_BESIDE = 8
"""Calls beside those that hold places: health and metadata."""
EXTENSIONS = ["model_repository"]
NEEDS: dict[str, Needs] = {
    "ServerLive": EVERYBODY,
    "ServerReady": EVERYBODY,
    "ServerMetadata": ANY,
    "ModelReady": USERS,
    "ModelMetadata": USERS,
    "ModelInfer": ("infer",),
    "RepositoryIndex": USERS,
    "RepositoryModelLoad": ("admin",),
    "RepositoryModelUnload": ("admin",),
}
"""By method: one of these scopes is needed, as at the same door over HTTP."""
ACTIONS = {"RepositoryModelLoad": "load", "RepositoryModelUnload": "unload"}
"""Methods that change something, and what the audit calls it."""


@dataclass(frozen=True)
class Door:
    """Where to listen, and who may come in."""

    address: str
    """Host and port."""
    watch: Watch | None = None
    """Who looks after it; None: nobody is asked who they are, and nothing is written down."""
    certificate: Certificate | None = None
    """What TLS is spoken with; None listens in clear."""
    grace_seconds: float = 30.0
    """How long calls that run may take when the server ends."""


@dataclass(frozen=True)
class House:
    """What answers behind the door."""

    inference: Inference
    loading: Executor
    """Where loads and unloads run."""
    alive: Callable[[], bool]
    """Whether the process works as it should."""


class Listener:
    """A gRPC server. Started and stopped in the event loop that answers."""

    def __init__(self, door: Door, house: House) -> None:
        self._grace_seconds = door.grace_seconds
        options = [
            ("grpc.max_receive_message_length", house.inference.limits.body_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # a second server on the port must fail, and not take half of the calls
        ]
        self._server = grpc.aio.server(
            options=options, maximum_concurrent_rpcs=house.inference.places.total + CALLS_BESIDE
        )
        self._server.add_generic_rpc_handlers((_handlers(_Calls(house), door.watch),))
        try:
            if door.certificate is None:
                self.port: int = self._server.add_insecure_port(door.address)
            else:
                self.port = self._server.add_secure_port(door.address, credentials(door.certificate))
        except RuntimeError as error:
            raise SetupError(
                f"listening on {door.address} for gRPC",
                found=str(error),
                fix="choose another with MODELPRESS_SERVING_GRPC_PORT, or end what listens there",
            ) from error

    async def start(self) -> None:
        """Let calls in."""
        await self._server.start()

    async def stop(self) -> None:
        """Let nobody in any more; calls that run have so long to end."""
        await self._server.stop(self._grace_seconds)


class _Calls:
    """One method for each of the service's, named as there; each takes request, context and tenant."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._inference, self._repository = house.inference, house.inference.repository

    async def ServerLive(self, _request: Any, _context: Any, _tenant: str) -> dict[str, Any]:  # noqa: N802
        return {"live": self._house.alive()}

    async def ServerReady(self, _request: Any, _context: Any, _tenant: str) -> dict[str, Any]:  # noqa: N802
        return {"ready": self._repository.ready}

    async def ModelReady(self, request: Any, _context: Any, _tenant: str) -> dict[str, Any]:  # noqa: N802
        try:
            self._repository.asked(request.name).answering(request.version or None)
        except NotReadyError:
            return {"ready": False}
        return {"ready": True}

    async def ServerMetadata(self, _request: Any, _context: Any, _tenant: str) -> dict[str, Any]:  # noqa: N802
        return {"name": "modelpress", "version": __version__, "extensions": EXTENSIONS}

    async def ModelMetadata(self, request: Any, _context: Any, _tenant: str) -> dict[str, Any]:  # noqa: N802
        model = self._repository.asked(request.name)
        return described(model, model.answering(request.version or None))

    async def ModelInfer(self, request: Any, context: Any, tenant: str) -> Any:  # noqa: N802
        inference, received = self._inference, asyncio.get_running_loop().time()
        most = inference.limits.tensor_bytes
        with inference.places.one(tenant):
            found = await inference.answer(
                request.model_name,
                request.model_version or None,
                lambda inputs, outputs: tensors.decode(request, inputs, outputs, most),
                received=received,
                timeout=context.time_remaining(),
                size=0 if request.raw_input_contents else request.ByteSize(),
                canary_key=metadatum(context, CANARY_KEY),
            )
            size = 0 if found.asked.binary else sum(array.nbytes for array in found.outputs.values())
            pack = found.loaded.engine.pack
            return await inference.coded(
                size, lambda: tensors.encode(request.model_name, pack, found.asked, found.outputs)
            )

    async def RepositoryIndex(self, request: Any, _context: Any, _tenant: str) -> dict[str, Any]:  # noqa: N802
        _check_repository(request)
        rows = [row for row in self._repository.index() if row["state"] == "READY" or not request.ready]
        return {"models": [{key: row[key] for key in row.keys() - {"held"}} for row in rows]}

    async def RepositoryModelLoad(self, request: Any, _context: Any, _tenant: str) -> dict[str, Any]:  # noqa: N802
        _check_repository(request)
        if request.parameters:
            expected = "none: what a model is, its pack says"
            raise RequestError("parameters", found=str(sorted(request.parameters))[:80], expected=expected)
        await self._elsewhere(self._repository.load, request.model_name)
        return {}

    async def RepositoryModelUnload(self, request: Any, _context: Any, _tenant: str) -> dict[str, Any]:  # noqa: N802
        _check_repository(request)
        await self._elsewhere(self._repository.unload, request.model_name)
        return {}

    async def _elsewhere(self, work: Callable[[str], None], name: str) -> None:
        await asyncio.get_running_loop().run_in_executor(self._house.loading, work, name)


def metadatum(context: Any, name: str) -> str | None:
    """Its text; None where there is none, or several."""
    given = [value for key, value in context.invocation_metadata() or () if key == name]
    return given[0] if len(given) == 1 and isinstance(given[0], str) else None


def _check_repository(request: Any) -> None:
    if request.repository_name:
        expected = "no name: there is one repository, the store"
        raise RequestError("repository_name", found=request.repository_name[:80], expected=expected)


def _handlers(calls: _Calls, watch: Watch | None) -> grpc.GenericRpcHandler:
    methods = {}
    for name, (asked, answered) in METHODS.items():
        methods[name] = grpc.unary_unary_rpc_method_handler(
            _bounded(name, answered, getattr(calls, name), watch),
            request_deserializer=asked.FromString,
            response_serializer=answered.SerializeToString,
        )
    return grpc.method_handlers_generic_handler(SERVICE, methods)


def _bounded(
    name: str, answered: Any, method: Callable[[Any, Any, str], Awaitable[Any]], watch: Watch | None
) -> Callable[[Any, Any], Awaitable[Any]]:
    """The method, for those who may call it, with its errors told as gRPC tells them."""

    async def call(request: Any, context: Any) -> Any:
        model = getattr(request, "model_name", "") or getattr(request, "name", "")
        visit = Visit(name, model, context, watch)
        with visit.span():
            try:
                found = await method(request, context, visit.enter())
                visit.status = 200
                return answered(**found) if isinstance(found, dict) else found
            except ModelpressError as error:
                visit.status, code, text = told(error, model)
            except Exception:
                log.exception("answering %s", name)
                visit.status, code, text = 500, "INTERNAL", UNFORESEEN
            finally:
                visit.leave()
        if code == "RESOURCE_EXHAUSTED":
            context.set_trailing_metadata((("grpc-retry-pushback-ms", str(RETRY_SECONDS * 1000)),))
        await context.abort(grpc.StatusCode[code], text)

    return call


class Visit:
    """One call: who makes it, and what is counted and written down of it."""

    def __init__(self, method: str, model: str, context: Any, watch: Watch | None) -> None:
        self._method, self._model, self._context, self._watch = method, model, context, watch
        self._began = time.perf_counter()
        self._principal: Principal = NOBODY
        self._inside = False
        self.status = CLOSED_BY_CLIENT
        """HTTP's, of the same answer; this one where there was none."""
        if watch is not None:
            watch.metrics.began(self._route)

    @property
    def _route(self) -> str:
        return f"/{SERVICE}/{self._method}"

    def span(self) -> AbstractContextManager[None]:
        """The call in its sender's trace, where traces are wanted."""
        if self._watch is None or self._watch.traces is None:
            return nullcontext()
        found = {name: metadatum(self._context, name) for name in CARRIED}
        brought = {name: value for name, value in found.items() if value is not None}
        return self._watch.traces.call(self._route, self._model, brought, self)

    def enter(self) -> str:
        """The tenant's name.

        Raises:
            UnauthenticatedError, ForbiddenError: they may not come in.
        """
        needs = NEEDS[self._method]
        if self._watch is not None and needs is not None:
            try:
                given = metadatum(self._context, "authorization")
                self._principal = self._watch.keyring.check(given, *needs, model=self._model or None)
            except RequestError as error:
                who = error.who if isinstance(error, ForbiddenError) else ""
                self._watch.audit.refused(self._address, "CALL", self._route, error.status, one_line(error), who)
                raise
        self._inside = True
        return self._principal.name

    def leave(self) -> None:
        """Count it, and write it down where it changed something."""
        if self._watch is None:
            return
        if self._inside and (action := ACTIONS.get(self._method)):
            self._watch.audit.done(self._principal, action, self._address, self._model, self.status, {})
        seconds = time.perf_counter() - self._began
        self._watch.metrics.answered(self._route, self._model or None, self.status, seconds)

    @property
    def _address(self) -> str:
        return str(self._context.peer())
