"""The Open Inference Protocol v2 over HTTP: a Starlette application, with inference past its routing (`serving.infer`).

The event loop moves bytes and what is small; loading, inference and large bodies are for threads.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from modelpress import __version__
from modelpress.errors import ModelpressError
from modelpress.store.threads import DaemonPool
from serving import openapi
from serving.canary import Canaries
from serving.infer import GoneError, InferDoor, Inference, Limits, read_body, target
from serving.metadata import metadata, store_state
from serving.processed import ProcessedModel
from serving.refusals import UNFORESEEN, NotReadyError, RequestError, told
from serving.repository import Repository, ServedModel
from serving.tensors import short

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from serving.rpc.service import Door

log = logging.getLogger("modelpress.serving")

MODEL, VERSION = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"
INFER_PATHS = (f"{MODEL}/infer", f"{VERSION}/infer")
EXTENSIONS = ["model_repository", "binary_tensor_data"]
CLOSED_BY_CLIENT = 499
SMALL_BODY_BYTES = 2**16
"""Cap for requests that carry no tensors."""

T = TypeVar("T")


class App(Starlette):
    """Starlette, but that requests for inference go straight to their door: its routing takes longer than they may."""

    def __init__(self, door: InferDoor, **options: Any) -> None:
        super().__init__(**options)
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the life of the application."""
        if scope["type"] != "http" or scope["method"] != "POST" or target(scope["path"]) is None:
            await super().__call__(scope, receive, send)
            return
        try:
            await self._door(scope, receive, send)
        except Exception:
            log.exception("answering %s", scope["path"][:200])
            await _refusal(UNFORESEEN, 500)(scope, receive, send)


def create_app(
    repository: Repository,
    *,
    poll_seconds: float,
    workers: int,
    limits: Limits | None = None,
    canaries: Canaries | None = None,
    routes: Sequence[BaseRoute] = (),
    rpc: Door | None = None,
) -> App:
    """The application over a started repository.

    Args:
        repository: what is served; `Repository.start` has run.
        poll_seconds: how often the pointers are read; 0 never reads them.
        workers: inferences at a time.
        limits: of requests for inference; None takes the defaults.
        canaries: of the models; None has none.
        routes: further ones, of other parts.
        rpc: where gRPC listens beside; None: nowhere.
    """
    poller = _Poller(repository, poll_seconds)
    inference = Inference(repository, workers, limits or Limits(), canaries)
    door = InferDoor(inference)
    doors = _Doors(repository, poller, canaries)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        try:
            async with _listening(rpc, inference, doors) if rpc else nullcontext():
                poller.start()
                if canaries is not None:
                    canaries.start()
                yield
        finally:
            poller.stop()
            if canaries is not None:
                await asyncio.to_thread(canaries.stop)
            doors.close()
            inference.close()

    handlers: dict[Any, Any] = {
        ModelpressError: _answer_known,
        HTTPException: _answer_http,
        GoneError: _answer_nobody,
        Exception: _answer_unknown,
    }
    every = [*doors.routes(), *(Route(path, door, methods=["POST"]) for path in INFER_PATHS), *routes]
    app = App(door, routes=every, exception_handlers=handlers, lifespan=lifespan)
    app.state.inference = inference
    return app


@asynccontextmanager
async def _listening(rpc: Door, inference: Inference, doors: _Doors) -> AsyncIterator[None]:
    from serving.rpc.service import House, Listener  # grpcio is imported where it is asked for

    listener = Listener(rpc, House(inference, doors.loading, doors.alive))
    await listener.start()
    log.info("listening on grpc://%s", rpc.address)
    try:
        yield
    finally:
        await listener.stop()


class _Doors:
    """The endpoints, but inference."""

    def __init__(self, repository: Repository, poller: _Poller, canaries: Canaries | None) -> None:
        self._repository, self._poller, self._canaries = repository, poller, canaries
        # Loading takes seconds and must not hold the threads that answer; nor the end of the process.
        self.loading = DaemonPool(1, "load")

    def routes(self) -> list[Route]:
        model, version, repository = MODEL, VERSION, "/v2/repository/models/{name}"
        return [
            Route("/v2/health/live", self.live),
            Route("/v2/health/ready", self.ready),
            Route(f"{model}/ready", self.model_ready),
            Route(f"{version}/ready", self.model_ready),
            Route(model, self.metadata),
            Route(version, self.metadata),
            Route("/v2", self.server),
            Route("/v2/openapi.json", self.openapi),
            Route("/v2/repository/index", self.index, methods=["POST"]),
            Route(f"{repository}/load", self.load, methods=["POST"]),
            Route(f"{repository}/unload", self.unload, methods=["POST"]),
        ]

    def alive(self) -> bool:
        """Whether the process works as it should."""
        # A dead poller would serve old packs in silence; whoever watches this starts the process again.
        return not self._poller.died

    def close(self) -> None:
        """Wait for nothing that waits on the store."""
        self.loading.shutdown(wait=False, cancel_futures=True)

    async def server(self, _request: Request) -> Response:
        return _json({"name": "modelpress", "version": __version__, "extensions": EXTENSIONS})

    async def openapi(self, _request: Request) -> Response:
        return _json(openapi.document())

    async def live(self, _request: Request) -> Response:
        live = self.alive()
        return _json({"live": live}, 200 if live else 503)

    async def ready(self, _request: Request) -> Response:
        ready = self._repository.ready
        return _json({"ready": ready, **store_state(self._repository.lost)}, 200 if ready else 503)

    async def model_ready(self, request: Request) -> Response:
        model = self._model(request)
        try:
            model.answering(request.path_params.get("version"))
        except NotReadyError:
            return _json({"name": model.name, "ready": False}, 503)
        return _json({"name": model.name, "ready": True})

    async def metadata(self, request: Request) -> Response:
        model = self._model(request)
        document = metadata(model, model.answering(request.path_params.get("version")))
        if self._canaries is not None and (canary := self._canaries.shown(model.name)) is not None:
            document["parameters"]["canary"] = canary
        return _json(document)

    async def index(self, request: Request) -> Response:
        asked = await _small_json(request)
        if not isinstance(asked.get("ready", False), bool):
            raise RequestError("ready", found=short(asked["ready"]), expected="true or false")
        rows = self._repository.index()
        return _json([row for row in rows if row["state"] == "READY" or not asked.get("ready", False)])

    async def load(self, request: Request) -> Response:
        asked = await _small_json(request)
        if asked.get("parameters"):
            found, expected = short(asked["parameters"]), "none: what a model is, its pack says"
            raise RequestError("parameters", found=found, expected=expected)
        name = request.path_params["name"]
        await _in_thread(self.loading, lambda: self._repository.load(name))
        return _json({})

    async def unload(self, request: Request) -> Response:
        await _small_json(request)
        name = request.path_params["name"]
        await _in_thread(self.loading, lambda: self._repository.unload(name))
        return _json({})

    def _model(self, request: Request) -> ServedModel | ProcessedModel:
        return self._repository.asked(request.path_params["name"])


class _Poller(threading.Thread):
    """Reads the pointers every `seconds`, in a thread of its own: a slow store slows nobody."""

    def __init__(self, repository: Repository, seconds: float) -> None:
        super().__init__(name="poll", daemon=True)
        self._repository, self._seconds = repository, seconds
        self._stopped = threading.Event()

    def run(self) -> None:
        if not self._seconds:
            return
        while not self._stopped.wait(self._seconds):
            self._repository.poll()

    @property
    def died(self) -> bool:
        """Whether it should be polling and does not: an error that nobody foresaw ended it (and is in the log)."""
        return self._seconds > 0 and not self._stopped.is_set() and not self.is_alive()

    def stop(self) -> None:
        """Ask it to end; a load that hangs in the store does not hold up the end of the process."""
        self._stopped.set()


async def _small_json(request: Request) -> dict[str, Any]:
    """The object that a request without tensors carries; an empty one where it carries nothing."""
    announced = request.headers.get("content-length", "")
    body = await read_body(request.receive, int(announced) if announced.isdecimal() else 0, SMALL_BODY_BYTES)
    try:
        found = orjson.loads(body) if body.strip() else {}
    except orjson.JSONDecodeError as error:
        raise RequestError("body", found=str(error), expected="a JSON object, or nothing") from error
    if not isinstance(found, dict):
        raise RequestError("body", found=short(found), expected="a JSON object, or nothing")
    return found


async def _in_thread(pool: Executor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, work)


async def _answer_known(request: Request, error: ModelpressError) -> Response:
    status, _, text = told(error, request.path_params.get("name", ""))
    return _refusal(text, status)


async def _answer_http(_request: Request, error: HTTPException) -> Response:
    return _refusal(error.detail, error.status_code, error.headers)


async def _answer_nobody(_request: Request, _error: GoneError) -> Response:
    return Response(status_code=CLOSED_BY_CLIENT)


async def _answer_unknown(_request: Request, _error: Exception) -> Response:
    # Starlette raises it again after this answer, and uvicorn logs it with its traceback.
    return _refusal(UNFORESEEN, 500)


def _refusal(text: str, status: int, headers: Any = None) -> Response:
    return Response(orjson.dumps({"error": text}), status, headers, media_type="application/json")


def _json(document: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(document), status, media_type="application/json")
