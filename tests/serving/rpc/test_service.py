"""The gRPC server over real sockets: answers, refusals by code, deadlines, places, who may come in."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest

from modelpress import __version__
from modelpress.errors import SetupError
from serving.app import create_app
from serving.guard import by_token
from serving.infer import Limits
from serving.raw import to_raw
from serving.repository import Repository
from serving.rpc.messages import MESSAGES, METHODS, SERVICE
from serving.rpc.service import Door
from tests.serving.conftest import WIDTH, lookup_model, scale_model

pytestmark = pytest.mark.anyio
Call = Callable[..., Any]
ONES = np.ones((1, WIDTH), np.float32)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def serving(repository: Repository, limits: Limits | None = None, **door: Any) -> AsyncIterator[Call]:
    """A caller: the name of a method, and the fields of its request."""
    address = f"127.0.0.1:{free_port()}"
    app = create_app(repository, poll_seconds=0, workers=1, limits=limits, rpc=Door(address, **door))
    async with app.router.lifespan_context(app), grpc.aio.insecure_channel(address) as channel:

        async def call(method: str, *, timeout: float = 60, metadata: Any = None, **fields: Any) -> Any:
            asked, answered = METHODS[method]
            made = channel.unary_unary(
                f"/{SERVICE}/{method}",
                request_serializer=asked.SerializeToString,
                response_deserializer=answered.FromString,
            )
            return await made(asked(**fields), timeout=timeout, metadata=metadata)

        call.inference = app.state.inference  # type: ignore[attr-defined]
        yield call


def x(array: np.ndarray = ONES, *, raw: bool = True) -> dict[str, Any]:
    """The fields of a request for inference."""
    tensor = {"name": "x", "datatype": "FP32", "shape": list(array.shape)}
    if raw:
        return {"model_name": "scale", "inputs": [tensor], "raw_input_contents": [to_raw(array)]}
    contents = {"fp32_contents": array.ravel().tolist()}
    return {"model_name": "scale", "inputs": [tensor | {"contents": contents}]}


async def refused(call: Any) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    for secret in ("Traceback", ".py", "/store", "file://"):
        assert secret not in str(caught.value.details())
    return caught.value.code().name, str(caught.value.details())


async def test_all_methods_answer(press: Call, repository: Call) -> None:
    digest = press(scale_model(2.0))
    async with serving(repository("scale")) as call:
        assert (await call("ServerLive")).live
        assert (await call("ServerReady")).ready
        assert (await call("ModelReady", name="scale")).ready
        server = await call("ServerMetadata")
        assert (server.name, server.version, list(server.extensions)) == (
            "modelpress",
            __version__,
            ["model_repository"],
        )
        model = await call("ModelMetadata", name="scale", version=digest[:12])
        assert (model.name, list(model.versions), model.platform) == ("scale", [digest], "onnxruntime_onnx")
        assert [(one.name, one.datatype, list(one.shape)) for one in model.inputs] == [("x", "FP32", [-1, WIDTH])]
        raw = await call("ModelInfer", id="a", **x())
        assert (raw.model_name, raw.model_version, raw.id) == ("scale", digest, "a")
        assert np.array_equal(np.frombuffer(raw.raw_output_contents[0], np.float32), np.full(10, 2.0 * WIDTH))
        typed = await call("ModelInfer", **x(raw=False))
        assert (list(typed.outputs[0].contents.fp32_contents), typed.raw_output_contents) == ([2.0 * WIDTH] * 10, [])
        assert [(one.name, one.version, one.state) for one in (await call("RepositoryIndex")).models] == [
            ("scale", digest, "READY")
        ]
        await call("RepositoryModelUnload", model_name="scale")
        assert not (await call("ModelReady", name="scale")).ready
        assert list((await call("RepositoryIndex", ready=True)).models) == []
        assert (await refused(call("ModelInfer", **x())))[0] == "UNAVAILABLE"
        await call("RepositoryModelLoad", model_name="scale")
        assert (await call("ModelReady", name="scale")).ready


async def test_refusals_are_told_by_code(press: Call, repository: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    press(scale_model(2.0))
    press(lookup_model(), "lookup")
    async with serving(repository()) as call:
        code, text = await refused(call("ModelInfer", **x(np.ones((1, 3), np.float32))))
        assert (code, "[-1, 64]" in text) == ("INVALID_ARGUMENT", True)
        code, text = await refused(call("ModelInfer", **x() | {"model_name": "nobody"}))
        assert (code, "one of ['lookup', 'scale']" in text) == ("NOT_FOUND", True)
        assert (await refused(call("ModelInfer", model_version="0" * 64, **x())))[0] == "NOT_FOUND"
        assert (await refused(call("ModelReady", name="nobody")))[0] == "NOT_FOUND"
        assert (await refused(call("RepositoryModelLoad", model_name="nobody")))[0] == "NOT_FOUND"
        code, text = await refused(call("RepositoryIndex", repository_name="other"))
        assert (code, "one repository" in text) == ("INVALID_ARGUMENT", True)
        config = {"config": MESSAGE_PARAMETER}
        code, text = await refused(call("RepositoryModelLoad", model_name="scale", parameters=config))
        assert (code, "its pack says" in text) == ("INVALID_ARGUMENT", True)
        monkeypatch.setattr("serving.rpc.tensors.decode", lambda *_: 1 / 0)
        assert await refused(call("ModelInfer", **x())) == (
            "INTERNAL",
            "internal error; the server's log has the details",
        )


MESSAGE_PARAMETER: Any = {"string_param": "{}"}


async def test_a_message_over_the_cap_is_refused(press: Call, repository: Call) -> None:
    press(scale_model(2.0))
    async with serving(repository("scale"), Limits(body_bytes=2000)) as call:
        assert (await refused(call("ModelInfer", **x(np.ones((100, WIDTH), np.float32)))))[0] == "RESOURCE_EXHAUSTED"
        await call("ModelInfer", **x())
    async with serving(repository("scale"), Limits(tensor_bytes=400)) as call:
        code, text = await refused(call("ModelInfer", **x(np.ones((2, WIDTH), np.float32))))
        assert (code, "at most 400" in text) == ("INVALID_ARGUMENT", True)


async def test_deadlines_and_places(press: Call, repository: Call) -> None:
    press(scale_model(2.0))
    async with serving(repository("scale"), Limits(queue=0)) as call:
        engine = call.inference.repository.model("scale").answering().engine
        gate, run = asyncio.Event(), engine.infer
        loop = asyncio.get_running_loop()

        def held(*arguments: Any) -> Any:
            asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(60)
            return run(*arguments)

        engine.infer = held
        first = asyncio.ensure_future(call("ModelInfer", **x()))
        while call.inference.places._free:
            await asyncio.sleep(0.001)
        code, text = await refused(call("ModelInfer", **x()))
        assert (code, "a later try" in text) == ("RESOURCE_EXHAUSTED", True)
        gate.set()
        await first
        gate.clear()
        timeout = MESSAGES["ModelInferRequest"](model_name="scale")
        timeout.parameters["timeout"].int64_param = 50_000
        parameters = dict(timeout.parameters)
        assert (await refused(call("ModelInfer", parameters=parameters, **x())))[0] == "DEADLINE_EXCEEDED"
        gate.set()
        await call("ModelInfer", **x())
        assert call.inference.places._free == 1


async def test_who_has_no_token_is_refused_everything_but_health(press: Call, repository: Call) -> None:
    press(scale_model(2.0))
    token = "0123456789abcdef"
    async with serving(repository("scale"), authorize=by_token(token)) as call:
        for given in ((), (("authorization", "Bearer x"),), (("authorization", f"Bearer {token}"),) * 2):
            for method in METHODS:
                fields = x() if method == "ModelInfer" else {}
                if method in ("ServerLive", "ServerReady"):
                    await call(method, metadata=given)
                else:
                    assert (await refused(call(method, metadata=given, **fields)))[0] == "UNAUTHENTICATED"
        await call("ModelInfer", metadata=(("authorization", f"Bearer {token}"),), **x())


async def test_a_port_in_use_is_said(press: Call, repository: Call) -> None:
    press(scale_model(2.0))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        app = create_app(repository("scale"), poll_seconds=0, workers=1, rpc=Door(address))
        with pytest.raises(SetupError, match="MODELPRESS_SERVING_GRPC_PORT"):
            async with app.router.lifespan_context(app):
                pass
