"""The Open Inference Protocol v2 over HTTP, as a Starlette application.

The event loop only moves bytes: decoding, inference and encoding run in threads, where ONNX Runtime and orjson leave
the interpreter free for others.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, TypeVar

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from modelpress import __version__
from modelpress.errors import ModelpressError
from modelpress.store.threads import DaemonPool
from serving.engine import Engine
from serving.protocol import (
    BusyError,
    NotReadyError,
    RequestError,
    SlowBodyError,
    TooLargeError,
    decode_request,
    encode_response,
)
from serving.repository import Loaded, Repository, ServedModel

log = logging.getLogger("modelpress.serving")

MAX_BODY_BYTES = 32 * 2**20
MAX_QUEUE = 64
BODY_SECONDS = 60.0
"""How long a request for inference may take to send its body: it holds a place meanwhile."""
SMALL_BODY_BYTES = 2**16
"""Cap for requests that carry no tensors."""
RETRY_SECONDS = 1
CLOSED_BY_CLIENT = 499

T = TypeVar("T")


def create_app(
    repository: Repository,
    *,
    poll_seconds: float,
    workers: int,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_queue: int = MAX_QUEUE,
    more: Sequence[BaseRoute] = (),
) -> Starlette:
    """The application over a started repository.

    Args:
        repository: what is served; `Repository.start` has run.
        poll_seconds: how often the pointers are read; 0 never reads them.
        workers: inferences at a time.
        max_body_bytes: a larger request is refused before it is read.
        max_queue: requests for inference beside the `workers` that may be read and wait; more are refused unread. So
            bodies take at most `(workers + max_queue) * max_body_bytes`.
        more: further routes, behind the protocol's own.
    """
    poller = _Poller(repository, poll_seconds)
    doors = _Doors(repository, poller, workers, workers + max_queue, max_body_bytes)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        poller.start()
        try:
            yield
        finally:
            poller.stop()
            doors.close()

    handlers: dict[Any, Any] = {
        ModelpressError: _answer_known,
        HTTPException: _answer_http,
        ClientDisconnect: _answer_nobody,
        Exception: _answer_unknown,
    }
    return Starlette(routes=[*doors.routes(), *more], exception_handlers=handlers, lifespan=lifespan)


class _Doors:
    """The endpoints."""

    def __init__(self, repository: Repository, poller: _Poller, workers: int, places: int, max_body_bytes: int) -> None:
        self._repository, self._poller, self._max_body_bytes = repository, poller, max_body_bytes
        self._free = places
        """Requests for inference that may still come in; changed by the event loop alone."""
        self._inference = ThreadPoolExecutor(workers, thread_name_prefix="infer")
        # Loading takes seconds and must not hold the threads that answer; nor the end of the process.
        self._loading = DaemonPool(1, "load")

    def routes(self) -> list[Route]:
        model, version = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"
        repository = "/v2/repository/models/{name}"
        return [
            Route(f"{model}/infer", self.infer, methods=["POST"]),
            Route(f"{version}/infer", self.infer, methods=["POST"]),
            Route("/v2/health/live", self.live),
            Route("/v2/health/ready", self.ready),
            Route(f"{model}/ready", self.model_ready),
            Route(f"{version}/ready", self.model_ready),
            Route(model, self.metadata),
            Route(version, self.metadata),
            Route("/v2", self.server),
            Route("/v2/repository/index", self.index, methods=["POST"]),
            Route(f"{repository}/load", self.load, methods=["POST"]),
            Route(f"{repository}/unload", self.unload, methods=["POST"]),
        ]

    def close(self) -> None:
        """Wait for inferences that run, and for nothing that waits on the store."""
        self._loading.shutdown(wait=False, cancel_futures=True)
        self._inference.shutdown(cancel_futures=True)

    async def server(self, _request: Request) -> Response:
        return _json({"name": "modelpress", "version": __version__, "extensions": ["model_repository"]})

    async def live(self, _request: Request) -> Response:
        # A dead poller would serve old packs in silence; whoever watches this starts the process again.
        live = not self._poller.died
        return _json({"live": live}, 200 if live else 503)

    async def ready(self, _request: Request) -> Response:
        ready = self._repository.ready
        return _json({"ready": ready, **_store_state(self._repository.lost)}, 200 if ready else 503)

    async def model_ready(self, request: Request) -> Response:
        model = self._model(request)
        try:
            model.answering(request.path_params.get("version"))
        except NotReadyError:
            return _json({"name": model.name, "ready": False}, 503)
        return _json({"name": model.name, "ready": True})

    async def metadata(self, request: Request) -> Response:
        model = self._model(request)
        return _json(_metadata(model, model.answering(request.path_params.get("version"))))

    async def infer(self, request: Request) -> Response:
        model, version = self._model(request), request.path_params.get("version")
        if "inference-header-content-length" in request.headers:
            raise RequestError("body", found="binary tensor data", expected="JSON; the extension is not served")
        if not self._free:
            raise BusyError("inference", found="as many requests as this server takes in", expected="a later try")
        self._free -= 1
        try:
            body = await self._body_in_time(request)

            def answer() -> bytes:
                # One look at what is loaded: the whole answer comes from one pack, whatever is swapped meanwhile.
                engine = model.answering(version).engine
                asked = decode_request(body, engine.inputs, engine.outputs)
                return encode_response(model.name, engine.pack, asked.id, engine.infer(asked.inputs, asked.outputs))

            return _raw(await _in_thread(self._inference, answer))
        finally:
            self._free += 1

    async def index(self, request: Request) -> Response:
        body = await self._body(request, min(self._max_body_bytes, SMALL_BODY_BYTES))
        try:
            asked = orjson.loads(body) if body.strip() else {}
        except orjson.JSONDecodeError as error:
            raise RequestError("body", found=str(error), expected="a JSON object, or nothing") from error
        if not isinstance(asked, dict) or not isinstance(asked.get("ready", False), bool):
            raise RequestError("body", found="another value", expected='{"ready": true}, {"ready": false} or nothing')
        rows = self._repository.index()
        return _json([row for row in rows if row["state"] == "READY" or not asked.get("ready", False)])

    async def load(self, request: Request) -> Response:
        name = request.path_params["name"]
        await _in_thread(self._loading, lambda: self._repository.load(name))
        return _json({})

    async def unload(self, request: Request) -> Response:
        name = request.path_params["name"]
        await _in_thread(self._loading, lambda: self._repository.unload(name))
        return _json({})

    def _model(self, request: Request) -> ServedModel:
        return self._repository.model(request.path_params["name"])

    async def _body_in_time(self, request: Request) -> bytes:
        try:
            async with asyncio.timeout(BODY_SECONDS):
                return await self._body(request, self._max_body_bytes)
        except TimeoutError as error:
            raise SlowBodyError("body", found=f"a part of it in {BODY_SECONDS:.0f} s", expected="all of it") from error

    async def _body(self, request: Request, most: int) -> bytes:
        """The body, never more of it than `most`."""
        announced = request.headers.get("content-length", "")
        size = int(announced) if announced.isdecimal() else 0
        chunks: list[bytes] = []
        if size <= most:
            size = 0
            async for chunk in request.stream():
                size += len(chunk)
                if size > most:
                    break
                chunks.append(chunk)
        if size > most:
            raise TooLargeError("body", found=f"{size} bytes or more", expected=f"at most {most}")
        return b"".join(chunks)


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


async def _in_thread(pool: Executor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, work)


def _metadata(model: ServedModel, loaded: Loaded) -> dict[str, Any]:
    engine, entry, failure = loaded.engine, loaded.pointer, model.failure
    identity: dict[str, Any] = {
        "pack": engine.pack,
        "alias": entry.alias,
        "pointer": entry.number,
        "since": entry.created.isoformat(),
        "provider": engine.provider,
        **_tested(engine),
        **_store_state(model.lost),
    }
    return {
        "name": model.name,
        "versions": [engine.pack],
        "platform": "onnxruntime_onnx",
        "inputs": [spec.to_json() for spec in engine.inputs],
        "outputs": [spec.to_json() for spec in engine.outputs],
        "parameters": identity | ({"failure": failure.reason} if failure else {}),
    }


def _store_state(lost: datetime | None) -> dict[str, Any]:
    """That the store does not answer, where it does not: what answers then may be older than what was promoted."""
    return {} if lost is None else {"store": f"unreachable since {lost.isoformat(timespec='seconds')}"}


def _tested(engine: Engine) -> dict[str, Any]:
    """How the pack answered its golden samples."""
    tested = engine.tested
    if tested is None:
        return {"golden": False}
    return {"golden": True, "golden_difference": tested.difference, "golden_tolerance": tested.tolerance}


async def _answer_known(request: Request, error: ModelpressError) -> Response:
    """What the client can mend is told in full; what the operator must mend is told by kind, and logged."""
    if isinstance(error, RequestError):
        busy = {"Retry-After": str(RETRY_SECONDS)} if isinstance(error, BusyError) else None
        return _refusal(_one_line(error), error.status, busy)
    name = request.path_params.get("name", "")
    return _refusal(f"model {name!r} can't be loaded ({type(error).__name__}); see /v2/repository/index", 503)


async def _answer_http(_request: Request, error: HTTPException) -> Response:
    return _refusal(error.detail, error.status_code, error.headers)


async def _answer_nobody(_request: Request, _error: ClientDisconnect) -> Response:
    return Response(status_code=CLOSED_BY_CLIENT)


async def _answer_unknown(_request: Request, _error: Exception) -> Response:
    # Starlette raises it again after this answer, and uvicorn logs it with its traceback.
    return _refusal("internal error; the server's log has the details", 500)


def _one_line(error: RequestError) -> str:
    text = f"{error.doing}: found {error.found}" if error.found else error.doing
    return f"{text}; expected {error.expected}" if error.expected else text


def _refusal(text: str, status: int, headers: Any = None) -> Response:
    return Response(orjson.dumps({"error": text}), status, headers, media_type="application/json")


def _json(document: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(document), status, media_type="application/json")


def _raw(body: bytes) -> Response:
    return Response(body, media_type="application/json")
