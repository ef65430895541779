"""A request for inference, from its first byte to its answer: the hot path, as plain ASGI past all routing.

The event loop moves bytes and checks what is small; runs of models, and large bodies of JSON, are for threads. What
REST and gRPC share is `Inference`: places, limits, deadlines, the one look at what is loaded, and batching.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import orjson

from modelpress.errors import ModelpressError
from serving.batching import Batcher, Bounds
from serving.expansion import MAX_JSON_BYTES
from serving.models import Loaded, ServedModel
from serving.processed import Processed
from serving.protocol import (
    BusyError,
    EncodingError,
    InferRequest,
    RequestError,
    SlowBodyError,
    TooLargeError,
    decode_request,
    encode_mixed,
)
from serving.refusals import RETRY_SECONDS, told
from serving.tensors import MAX_TENSOR_BYTES, TensorSpec, short

if TYPE_CHECKING:
    import numpy as np
    from starlette.types import Message, Receive, Scope, Send

    from serving.canary import Canaries, Turn
    from serving.engine import Engine
    from serving.repository import Repository

log = logging.getLogger("modelpress.serving")

MAX_BODY_BYTES = 32 * 2**20
MAX_QUEUE = 64
BODY_SECONDS = 60.0
"""How long a request for inference may take to send its body: it holds a place meanwhile."""
SMALL_BYTES = 2**14
"""JSON up to this is coded in the event loop, where it takes less time than a thread's turn does."""
TENANT = "modelpress.tenant"
"""Key of an ASGI scope: who asks, as whoever checked the request's key has put it there."""
ANONYMOUS = "anonymous"
CLOSED_BY_CLIENT = 499
CANARY_KEY = "modelpress-canary-key"
"""Header, or metadatum of gRPC, of a client that wants always the same model of a canary."""
PACK_HEADER = b"modelpress-pack"
"""Of each answer: digest of the pack that gave it."""

T = TypeVar("T")
Arrays = dict[str, "np.ndarray"]


@dataclass(frozen=True)
class Limits:
    """What requests for inference may take."""

    queue: int = MAX_QUEUE
    """Requests beside those that run that may be read and wait; more are refused unread."""
    body_bytes: int = MAX_BODY_BYTES
    """A larger request is refused before it is read. So bodies take at most `(workers + queue) * body_bytes`."""
    tensor_bytes: int = MAX_TENSOR_BYTES
    """A larger tensor is refused before it is made."""
    json_bytes: int = MAX_JSON_BYTES
    """JSON that would take more, once it is read, is refused unread: at most `workers` are read at a time."""
    tenant_share: float = 1.0
    """Share of all places that the requests of one tenant may hold."""
    bounds: Bounds = field(default_factory=Bounds)
    """How far requests are joined."""


class Places:
    """How many requests may be here at once, and how many of one tenant; belongs to one event loop."""

    def __init__(self, total: int, tenant_share: float) -> None:
        self.total = total
        self._free, self._most = total, max(1, math.ceil(total * tenant_share))
        self._held: dict[str, int] = {}

    @contextmanager
    def one(self, tenant: str) -> Iterator[None]:
        """A place, while this is open.

        Raises:
            BusyError: all are taken, or all that one tenant may have.
        """
        held = self._held.get(tenant, 0)
        if held >= self._most or not self._free:
            whose = "of this tenant " if held >= self._most and self._free else ""
            found = f"as many requests {whose}as this server takes in"
            raise BusyError("inference", found=found, expected="a later try")
        self._free -= 1
        self._held[tenant] = held + 1
        try:
            yield
        finally:
            self._free += 1
            self._held[tenant] -= 1
            if not self._held[tenant]:
                del self._held[tenant]  # or names of all who ever asked would stay


@dataclass(frozen=True)
class Answer:
    """What a request is answered with: all of it from one pack."""

    loaded: Loaded
    outputs: dict[str, np.ndarray]
    asked: InferRequest


class Inference:
    """Answers requests for inference; belongs to one event loop."""

    def __init__(self, repository: Repository, workers: int, limits: Limits, canaries: Canaries | None = None) -> None:
        self.repository, self.limits, self.canaries = repository, limits, canaries
        self.batcher = Batcher(workers, limits.bounds)
        self.places = Places(workers + limits.queue, limits.tenant_share)
        self._coding = ThreadPoolExecutor(workers, thread_name_prefix="code")

    def close(self) -> None:
        """Wait for inferences that run."""
        self.batcher.close()
        self._coding.shutdown(cancel_futures=True)

    async def answer(
        self,
        name: str,
        version: str | None,
        decode: Callable[[list[TensorSpec], list[TensorSpec]], InferRequest],
        *,
        received: float,
        timeout: float | None = None,
        size: int = 0,
        canary_key: str | None = None,
    ) -> Answer:
        """Answer a request that has a place, and whose bytes are here.

        Args:
            name: of the model.
            version: a digest, its first digits, or None for the pack that answers now.
            decode: makes the arrays, from what the model takes and gives.
            received: time of the loop when the request came; deadlines count from here.
            timeout: seconds that the client waits, beside what the request itself says.
            size: bytes that decoding has to go through: much is done in a thread.
            canary_key: of a client that wants always the same model of a canary; see `serving.canary`.

        Raises:
            RequestError: it can't be answered, and why.
        """
        # One look at what is loaded: the whole answer comes from one pack, whatever is swapped meanwhile.
        model = self.repository.asked(name)
        shown = model.answering(version)
        asked = await self.coded(size, lambda: decode(shown.engine.inputs, shown.engine.outputs))
        limits = [seconds for seconds in (timeout, asked.timeout_seconds) if seconds is not None]
        deadline = received + min(limits) if limits else None
        if isinstance(model, ServedModel):
            assert isinstance(shown, Loaded)
            turn = self._turn(model, shown, canary_key) if version is None else None
            return Answer(*await self._run(shown, turn, asked.inputs, asked.outputs, deadline), asked)
        assert isinstance(shown, Processed)
        front = shown.engine
        prepared = await self._in_thread(lambda: front.prepare(asked.inputs))
        turn = self._turn(model.behind, shown.behind, canary_key) if version is None else None
        if turn is not None and not front.serves(turn.candidate.engine):
            turn = None  # it would get tensors that another tokenizer made
        loaded, found = await self._run(shown.behind, turn, prepared, front.graph_outputs, deadline)
        return Answer(loaded, await self._in_thread(lambda: front.finish(found, prepared, asked.outputs)), asked)

    def _turn(self, model: ServedModel, loaded: Loaded, key: str | None) -> Turn | None:
        return self.canaries.turn(model, loaded, key) if self.canaries else None

    async def _run(
        self, loaded: Loaded, turn: Turn | None, inputs: Arrays, outputs: list[str], deadline: float | None
    ) -> tuple[Loaded, Arrays]:
        """Who answered, and what."""

        def run(engine: Engine) -> Awaitable[Arrays]:
            return self.batcher.run(engine, inputs, outputs, deadline)

        if turn is None:
            return loaded, await run(loaded.engine)
        return await turn.run(run, inputs, outputs)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._coding, work)

    async def coded(self, size: int, work: Callable[[], T]) -> T:
        """Decode or encode `size` bytes: here, or in a thread where that takes longer than the way there."""
        if size <= SMALL_BYTES:
            return work()
        return await self._in_thread(work)


class InferDoor:
    """`POST /v2/models/NAME[/versions/VERSION]/infer` as ASGI."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, whose path was matched: `target` finds name and version in it."""
        name, version = target(scope["path"]) or ("", None)
        try:
            status, headers, body = await self._answer(scope, receive, name, version)
        except ModelpressError as error:
            status, _, text = told(error, name)
            headers = [(b"content-type", b"application/json")]
            headers += [(b"retry-after", b"%d" % RETRY_SECONDS)] if isinstance(error, BusyError) else []
            body = orjson.dumps({"error": text})
        except GoneError:
            status, headers, body = CLOSED_BY_CLIENT, [], b""
        headers.append((b"content-length", b"%d" % len(body)))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(
        self, scope: Scope, receive: Receive, name: str, version: str | None
    ) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        inference, received = self._inference, asyncio.get_running_loop().time()
        inference.repository.asked(name)
        asks = _Asks.read(scope["headers"])
        with inference.places.one(scope.get(TENANT, ANONYMOUS)):
            body = await _body_in_time(receive, asks.body_bytes, inference.limits.body_bytes)
            limits = inference.limits

            def decode(inputs: list[TensorSpec], outputs: list[TensorSpec]) -> InferRequest:
                most = {"max_tensor_bytes": limits.tensor_bytes, "max_json_bytes": limits.json_bytes}
                return decode_request(body, inputs, outputs, asks.header_bytes, **most)

            size = len(body) if asks.header_bytes is None else asks.header_bytes
            found = await inference.answer(
                name,
                version,
                decode,
                received=received,
                timeout=asks.timeout_seconds,
                size=size,
                canary_key=asks.canary_key,
            )
            asked, pack = found.asked, found.loaded.engine.pack
            size = sum(array.nbytes for output, array in found.outputs.items() if output not in asked.binary)
            encoded, header_bytes = await inference.coded(
                size, lambda: encode_mixed(name, pack, asked.id, found.outputs, asked.binary)
            )
        by = (PACK_HEADER, pack.encode())
        if header_bytes is None:
            return 200, [(b"content-type", b"application/json"), by], encoded
        length = (b"inference-header-content-length", b"%d" % header_bytes)
        return 200, [(b"content-type", b"application/octet-stream"), length, by], encoded


def target(path: str) -> tuple[str, str | None] | None:
    """Model and version of a path of inference; None: it is another path."""
    parts = path.split("/")
    if parts[-1] != "infer" or parts[:3] != ["", "v2", "models"] or not all(parts[3:]):
        return None
    if len(parts) == 5:
        return parts[3], None
    if len(parts) == 7 and parts[4] == "versions":
        return parts[3], parts[5]
    return None


@dataclass(frozen=True)
class _Asks:
    """What the headers say."""

    body_bytes: int = 0
    """Announced length; 0 where there is none."""
    header_bytes: int | None = None
    timeout_seconds: float | None = None
    canary_key: str | None = None
    """For a client that wants always the same model of a canary."""

    @classmethod
    def read(cls, headers: list[tuple[bytes, bytes]]) -> _Asks:
        body_bytes, header_bytes, timeout, key = 0, None, None, None
        for name, value in headers:
            if name == b"content-length":
                body_bytes = int(value) if value.isdigit() else 0
            elif name == b"inference-header-content-length":
                header_bytes = _whole(name, value, "the length of the JSON, in bytes")
            elif name == b"x-request-timeout":
                timeout = _whole(name, value, "milliseconds, an integer") / 1e3
            elif name == CANARY_KEY.encode():
                key = value.decode("latin-1")
            elif name == b"content-encoding" and value.lower() not in (b"", b"identity"):
                raise EncodingError("body", found=f"Content-Encoding {short(value.decode('latin-1'))}", expected="none")
        return cls(body_bytes, header_bytes, timeout, key)


def _whole(name: bytes, value: bytes, expected: str) -> int:
    if not value.isdigit() or len(value) > 12:
        raise RequestError(name.decode(), found=short(value.decode("latin-1")), expected=expected)
    return int(value)


class GoneError(Exception):
    """The client went away before it had sent its request."""


async def _body_in_time(receive: Receive, announced: int, most: int) -> bytes:
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await read_body(receive, announced, most)
    except TimeoutError as error:
        raise SlowBodyError("body", found=f"a part of it in {BODY_SECONDS:.0f} s", expected="all of it") from error


async def read_body(receive: Receive, announced: int, most: int) -> bytes:
    """The body, never more of it than `most`."""
    chunks: list[bytes] = []
    size, more = 0, announced <= most
    while more:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            raise GoneError
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        chunks.append(chunk)
        more = message.get("more_body", False) and size <= most
    if max(size, announced) > most:
        raise TooLargeError("body", found=f"{max(size, announced)} bytes or more", expected=f"at most {most}")
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)
