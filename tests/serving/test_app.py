"""The protocol's endpoints over the real repository, store and runtime, without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import numpy as np
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelpress import __version__, graph
from serving.protocol import decode_response, encode_request
from tests.serving.conftest import CAP, CLASSES, WIDTH, client_of, lookup_model, scale_model

INFER = "/v2/models/scale/infer"
Call = Callable[..., Any]

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def client(press: Call, repository: Call) -> AsyncIterator[httpx.AsyncClient]:
    press(scale_model(2.0))
    press(lookup_model(), "lookup")
    async with client_of(repository()) as made:
        yield made


def ones(batch: int = 1) -> dict[str, np.ndarray]:
    return {"x": np.ones((batch, WIDTH), np.float32)}


def check_error(answer: httpx.Response, status: int, said: str = "") -> None:
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert said in answer.json()["error"]
    for secret in ("Traceback", ".py", "/store", "file://", "onnxruntime_src"):
        assert secret not in answer.text


async def test_the_server_names_itself_and_is_well(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v2")).json() == {
        "name": "modelpress",
        "version": __version__,
        "extensions": ["model_repository", "binary_tensor_data"],
    }
    assert (await client.get("/v2/health/live")).json() == {"live": True}
    assert (await client.get("/v2/health/ready")).json() == {"ready": True}
    assert (await client.get("/v2/models/scale/ready")).json() == {"name": "scale", "ready": True}


async def test_metadata_shows_the_pack_that_answers(press: Call, repository: Call) -> None:
    digest = press(scale_model(2.0))
    async with client_of(repository("scale")) as client:
        found = (await client.get("/v2/models/scale")).json()
        assert found["name"] == "scale"
        assert found["versions"] == [digest]
        assert found["platform"] == "onnxruntime_onnx"
        assert found["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, WIDTH]}]
        assert found["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, CLASSES]}]
        shown = found["parameters"]
        assert (shown["pack"], shown["alias"], shown["pointer"]) == (digest, "champion", 1)
        assert shown["provider"] == "CPUExecutionProvider"
        assert "failure" not in shown
        for version in (digest, digest[:12]):
            assert (await client.get(f"/v2/models/scale/versions/{version}")).json() == found
            assert (await client.get(f"/v2/models/scale/versions/{version}/ready")).status_code == 200
        for version in ("0" * 64, digest[:11], "1"):
            check_error(await client.get(f"/v2/models/scale/versions/{version}"), 404, digest)
            check_error(await client.post(f"/v2/models/scale/versions/{version}/infer"), 404)


async def test_answers_are_the_runtime_s_own_bit_for_bit(client: httpx.AsyncClient) -> None:
    x = np.random.default_rng(0).normal(size=(7, WIDTH)).astype(np.float32)
    model = graph.join(scale_model(2.0)).SerializeToString()
    (expected,) = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    answer = await client.post(INFER, content=encode_request({"x": x}, "a"))
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["id"] == "a"
    found = decode_response(answer.content)["y"]
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


async def test_several_inputs_and_a_chosen_output(client: httpx.AsyncClient) -> None:
    inputs = {"input_ids": np.array([[3, 5]], np.int64), "attention_mask": np.ones((1, 2, 1), np.float32)}
    answer = await client.post("/v2/models/lookup/infer", content=encode_request(inputs))
    assert decode_response(answer.content)["y"][0, 1].tolist() == [float(value) for value in range(40, 48)]


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        (INFER, b"{", 400, "a JSON object"),
        (INFER, b'{"inputs": []}', 400, "one or more"),
        (INFER, encode_request({"z": np.ones((1, WIDTH), np.float32)}), 400, "one of ['x']"),
        (INFER, encode_request({"x": np.ones((1, 3), np.float32)}), 400, "[-1, 64]"),
        (INFER, encode_request({"x": np.ones((1, WIDTH))}), 400, "FP32"),
        (INFER, encode_request({"x": np.full((1, WIDTH), 3e38, np.float32)}), 400, "infinite"),
        (INFER, b" " * (CAP + 1), 413, str(CAP)),
        ("/v2/models/nobody/infer", b"{}", 404, "one of ['lookup', 'scale']"),
        ("/v2/models/x" + "y" * 5000 + "/infer", b"{}", 404, "one of"),
        ("/v2/nothing", b"{}", 404, ""),
        ("/v2/models/..%2f..%2fetc/infer", b"{}", 404, ""),
        ("/v2/health/live", b"{}", 405, ""),
        ("/v2/repository/index", b"[]", 400, "a JSON object"),
        ("/v2/repository/index", b'{"ready": 1}', 400, "true or false"),
        ("/v2/repository/models/scale/load", b'{"parameters": {"config": "{}"}}', 400, "its pack says"),
        ("/v2/repository/models/nobody/load", b"", 404, "one of"),
        ("/v2/repository/models/nobody/unload", b"", 404, "one of"),
    ],
    ids=str,
)
async def test_errors_are_the_protocol_s(
    client: httpx.AsyncClient, path: str, body: bytes, status: int, said: str
) -> None:
    check_error(await client.post(path, content=body), status, said)


async def test_values_that_the_model_refuses_are_the_client_s_fault(client: httpx.AsyncClient) -> None:
    inputs = {"input_ids": np.array([[100]], np.int64), "attention_mask": np.ones((1, 1, 1), np.float32)}
    check_error(await client.post("/v2/models/lookup/infer", content=encode_request(inputs)), 400, "can't run on")
    inputs["attention_mask"] = np.ones((1, 4, 1), np.float32)
    check_error(await client.post("/v2/models/lookup/infer", content=encode_request(inputs)), 400, "length 1")


async def test_a_body_without_a_length_is_capped_too(client: httpx.AsyncClient) -> None:
    async def endless() -> AsyncIterator[bytes]:
        sent = 0
        while sent <= 2 * CAP:
            yield b" " * 10_000
            sent += 10_000

    check_error(await client.post(INFER, content=endless()), 413)


async def test_unload_and_load(client: httpx.AsyncClient) -> None:
    assert (await client.post("/v2/repository/models/scale/unload")).status_code == 200
    assert (await client.get("/v2/models/scale/ready")).status_code == 503
    check_error(await client.post(INFER, content=encode_request(ones())), 503, "not loaded")
    rows = {row["name"]: row for row in (await client.post("/v2/repository/index")).json()}
    assert (rows["scale"]["state"], rows["scale"]["reason"]) == ("UNAVAILABLE", "unloaded by request")
    assert rows["lookup"]["state"] == "READY"
    ready = (await client.post("/v2/repository/index", json={"ready": True})).json()
    assert [row["name"] for row in ready] == ["lookup"]
    assert (await client.get("/v2/health/ready")).status_code == 200
    assert (await client.post("/v2/repository/models/scale/load")).status_code == 200
    assert (await client.post(INFER, content=encode_request(ones()))).status_code == 200


async def test_an_unforeseen_error_shows_nothing(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("in /secret/place.py")

    monkeypatch.setattr("serving.infer.decode_request", broken)
    check_error(await client.post(INFER, content=encode_request(ones())), 500, "internal error")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_server_whose_poller_died_is_not_alive(
    press: Call, repository: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    press(scale_model(2.0))
    models = repository("scale")
    polled = asyncio.Event()
    loop = asyncio.get_running_loop()

    def poll() -> None:
        loop.call_soon_threadsafe(polled.set)
        if broken:
            raise ZeroDivisionError

    broken = False
    monkeypatch.setattr(models, "poll", poll)
    async with client_of(models, poll_seconds=0.01) as client:
        await asyncio.wait_for(polled.wait(), 10)
        assert (await client.get("/v2/health/live")).status_code == 200
        broken = True
        async with asyncio.timeout(10):
            while (await client.get("/v2/health/live")).status_code == 200:
                await asyncio.sleep(0.01)
        answer = await client.get("/v2/health/live")
        assert (answer.status_code, answer.json()) == (503, {"live": False})


async def test_a_request_too_many_is_refused_unread(press: Call, repository: Call) -> None:
    press(scale_model(2.0))
    body, entered, go_on = encode_request(ones()), [0], asyncio.Event()

    async def held() -> AsyncIterator[bytes]:
        yield body[:10]
        entered[0] += 1
        await go_on.wait()
        yield body[10:]

    read = []

    async def never() -> AsyncIterator[bytes]:
        read.append(1)
        yield body

    async with client_of(repository("scale"), workers=1, max_queue=1) as client:
        for _ in range(3):  # places come back after answers, and after refusals
            go_on.clear()
            entered[0] = 0
            first = [asyncio.ensure_future(client.post(INFER, content=held())) for _ in range(2)]
            async with asyncio.timeout(10):
                while entered[0] < 2:
                    await asyncio.sleep(0.01)
            refused = await client.post(INFER, content=never())
            check_error(refused, 429, "a later try")
            assert refused.headers["Retry-After"] == "1"
            assert read == []
            go_on.set()
            assert [answer.status_code for answer in await asyncio.gather(*first)] == [200, 200]
            check_error(await client.post(INFER, content=b"{"), 400)


async def test_a_body_that_does_not_come_gives_up_its_place(
    press: Call, repository: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    press(scale_model(2.0))
    monkeypatch.setattr("serving.infer.BODY_SECONDS", 0.05)

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b""
            await asyncio.sleep(0.01)

    async with client_of(repository("scale"), workers=1, max_queue=0) as client:
        check_error(await client.post(INFER, content=endless()), 408)
        assert (await client.post(INFER, content=encode_request(ones()))).status_code == 200


@given(body=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_bytes_make_a_server_error(client: httpx.AsyncClient, body: bytes) -> None:
    for path in (INFER, "/v2/models/lookup/infer"):
        assert (await client.post(path, content=body)).status_code == 400
