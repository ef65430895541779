"""The gRPC server over real sockets: answers, refusals by code, deadlines, places, who may come in."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from modelpress import __version__
from modelpress.access import SCOPES, KeyFile, new_key
from modelpress.errors import SetupError
from serving.app import create_app
from serving.audit import Audit
from serving.infer import Limits
from serving.keyring import Keyring, Sources
from serving.metrics import Metrics
from serving.raw import to_raw
from serving.repository import Repository
from serving.rpc import service
from serving.rpc.messages import MESSAGES, METHODS, SERVICE
from serving.rpc.service import Door
from serving.scopes import NEEDS
from serving.tls import Certificate
from serving.watch import Watch
from tests.serving.authority import Authority
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


OVER_HTTP = {
    "ServerLive": "/v2/health/live",
    "ServerReady": "/v2/health/ready",
    "ServerMetadata": "/v2",
    "ModelReady": "/v2/models/{name}/ready",
    "ModelMetadata": "/v2/models/{name}",
    "ModelInfer": "/v2/models/{name}/infer",
    "RepositoryIndex": "/v2/repository/index",
    "RepositoryModelLoad": "/v2/repository/models/{name}/load",
    "RepositoryModelUnload": "/v2/repository/models/{name}/unload",
}


def test_a_call_needs_what_its_door_over_http_needs() -> None:
    assert {method: NEEDS[path] for method, path in OVER_HTTP.items()} == service.NEEDS
    assert set(METHODS) == set(OVER_HTTP)


async def test_each_key_opens_what_it_is_for_and_it_is_written_down(
    press: Call, repository: Call, tmp_path: Path
) -> None:
    press(scale_model(2.0))
    now, models = datetime.now(UTC), repository("scale")
    made = {scope: new_key(f"only-{scope}", [scope], None, now) for scope in SCOPES}
    gone = new_key("gone", list(SCOPES), now, now - timedelta(days=1))
    others = new_key("others", list(SCOPES), None, now, ["other"])
    kept = [key for _, key in made.values()] + [gone[1], others[1]]
    (tmp_path / "keys.json").write_bytes(KeyFile(keys=tuple(kept)).to_bytes())
    (tmp_path / "keys.json").chmod(0o600)
    keyring, audit = Keyring(Sources(tmp_path / "keys.json")), Audit(tmp_path / "audit.jsonl")
    metrics = Metrics(models, keyring, 1)
    async with serving(models, watch=Watch(keyring, audit, metrics)) as call:

        async def asked(method: str, *keys: str) -> str:
            fields = x() if method == "ModelInfer" else {"name": "scale"} if method.startswith("Model") else {}
            fields |= {"model_name": "scale"} if "RepositoryModel" in method else {}
            metadata = tuple(("authorization", f"Bearer {key}") for key in keys)
            try:
                await call(method, metadata=metadata, **fields)
            except grpc.aio.AioRpcError as error:
                return str(error.code().name)
            return "OK"

        infer = made["infer"][0]
        for method, needs in service.NEEDS.items():
            for keys in ((), ("x",), (gone[0],), (infer, infer)):
                assert await asked(method, *keys) == ("OK" if needs is None else "UNAUTHENTICATED")
            for scope, (text, _) in made.items():
                allowed = needs is None or scope in needs
                assert await asked(method, text) == ("OK" if allowed else "PERMISSION_DENIED"), (method, scope)
                if method == "RepositoryModelUnload" and allowed:
                    models.load("scale")
            of_a_model = "Model" in method
            assert await asked(method, others[0]) == ("PERMISSION_DENIED" if of_a_model else "OK"), method
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    done = [(line["who"], line["action"], line["model"]) for line in lines if line["outcome"] == "done"]
    assert done == [("only-admin", "load", "scale"), ("only-admin", "unload", "scale")]
    assert {line["status"] for line in lines if line["outcome"] == "refused"} == {401, 403}
    assert metrics.outcomes("scale") == {"answered": 1, "refused": 5 + len(SCOPES) - 1, "failed": 0}
    assert metrics.in_flight == 0


async def test_with_a_certificate_only_tls_is_spoken(press: Call, repository: Call, tmp_path: Path) -> None:
    press(scale_model(2.0))
    authority = Authority(tmp_path)
    certificate = Certificate(*authority.issue("localhost"))
    address = f"127.0.0.1:{free_port()}"
    app = create_app(repository("scale"), poll_seconds=0, workers=1, rpc=Door(address, certificate=certificate))
    trusted = grpc.ssl_channel_credentials(authority.path.read_bytes())
    asked, answered = METHODS["ServerLive"]
    codecs: Any = {"request_serializer": asked.SerializeToString, "response_deserializer": answered.FromString}
    async with app.router.lifespan_context(app):
        options = (("grpc.ssl_target_name_override", "localhost"),)
        async with grpc.aio.secure_channel(address, trusted, options) as channel:
            assert (await channel.unary_unary(f"/{SERVICE}/ServerLive", **codecs)(asked(), timeout=30)).live
        async with grpc.aio.insecure_channel(address) as channel:
            code, _ = await refused(channel.unary_unary(f"/{SERVICE}/ServerLive", **codecs)(asked(), timeout=30))
            assert code == "UNAVAILABLE"


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
