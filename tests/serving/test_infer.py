"""The hot path over HTTP: binary tensors, deadlines, places of tenants, packs side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.app import create_app
from serving.infer import Limits, Places, target
from serving.protocol import BusyError, decode_response, encode_request
from serving.repository import Repository
from tests.serving.conftest import CAP, WIDTH, client_of, lookup_model, scale_model
from tests.serving.test_app import INFER, check_error

Call = Callable[..., Any]
ONE = encode_request({"x": np.ones((1, WIDTH), np.float32)})


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def client(press: Call, repository: Call) -> AsyncIterator[httpx.AsyncClient]:
    press(scale_model(2.0))
    async with client_of(repository("scale")) as made:
        yield made


def binary(rows: int, value: float = 1.0, **request: Any) -> tuple[bytes, dict[str, str]]:
    """A request with its input as bytes behind the JSON, and its headers."""
    data = np.full((rows, WIDTH), value, np.float32).tobytes()
    one = {"name": "x", "shape": [rows, WIDTH], "datatype": "FP32", "parameters": {"binary_data_size": len(data)}}
    header = orjson.dumps({"inputs": [one]} | request)
    return header + data, {"Inference-Header-Content-Length": str(len(header))}


@pytest.mark.anyio
async def test_binary_tensors_both_ways(client: httpx.AsyncClient) -> None:
    body, headers = binary(3, 0.5, id="a", parameters={"binary_data_output": True})
    answer = await client.post(INFER, content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers["inference-header-content-length"])
    assert orjson.loads(answer.content[:length])["id"] == "a"
    assert np.array_equal(decode_response(answer.content, length)["y"], np.full((3, 10), WIDTH, np.float32))
    answer = await client.post(INFER, content=binary(1)[0], headers=binary(1)[1])
    assert (answer.headers["content-type"], answer.json()["outputs"][0]["data"]) == ("application/json", [128.0] * 10)


@pytest.mark.anyio
async def test_what_json_can_not_say_goes_as_binary_data(client: httpx.AsyncClient) -> None:
    body, headers = binary(1, 3e38)
    check_error(await client.post(INFER, content=body, headers=headers), 400, "ask for the output as binary data")
    body, headers = binary(1, 3e38, outputs=[{"name": "y", "parameters": {"binary_data": True}}])
    answer = await client.post(INFER, content=body, headers=headers)
    found = decode_response(answer.content, int(answer.headers["inference-header-content-length"]))
    assert np.isinf(found["y"]).all()


@pytest.mark.anyio
async def test_large_bodies_are_coded_elsewhere_and_answered_the_same(client: httpx.AsyncClient) -> None:
    rows = 200
    body = encode_request({"x": np.ones((rows, WIDTH), np.float32)})
    assert 2**14 < len(body) < CAP
    answer = await client.post(INFER, content=body)
    assert np.array_equal(decode_response(answer.content)["y"], np.full((rows, 10), 2.0 * WIDTH, np.float32))


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("headers", "status", "said"),
    [
        ({"Inference-Header-Content-Length": "-1"}, 400, "length of the JSON"),
        ({"Inference-Header-Content-Length": "x"}, 400, "length of the JSON"),
        ({"Inference-Header-Content-Length": "9" * 13}, 400, "length of the JSON"),
        ({"Inference-Header-Content-Length": "0"}, 400, "JSON object"),
        ({"X-Request-Timeout": "soon"}, 400, "milliseconds"),
        ({"X-Request-Timeout": "-5"}, 400, "milliseconds"),
        ({"X-Request-Timeout": "0"}, 504, "deadline"),
        ({"Content-Encoding": "gzip"}, 415, "gzip"),
    ],
    ids=str,
)
async def test_headers_that_can_not_be_followed_are_refused(
    client: httpx.AsyncClient, headers: dict[str, str], status: int, said: str
) -> None:
    check_error(await client.post(INFER, content=ONE, headers=headers), status, said)
    assert (await client.post(INFER, content=ONE, headers={"X-Request-Timeout": "60000"})).status_code == 200


@pytest.mark.anyio
async def test_a_timeout_in_the_request_counts_too(client: httpx.AsyncClient) -> None:
    body = orjson.dumps(orjson.loads(ONE) | {"parameters": {"timeout": 1}})
    check_error(await client.post(INFER, content=body), 504, "deadline")
    body = orjson.dumps(orjson.loads(ONE) | {"parameters": {"timeout": 60_000_000}})
    assert (await client.post(INFER, content=body)).status_code == 200


@pytest.mark.anyio
async def test_a_held_pack_answers_beside_the_champion(press: Call, repository: Call) -> None:
    first = press(scale_model(2.0))
    second = press(scale_model(3.0), alias=None)
    models: Repository = repository("scale")
    models.hold("scale", second)
    async with client_of(models) as client:
        for version, value in ((first, 2.0), (second, 3.0), (second[:12], 3.0)):
            answer = await client.post(f"/v2/models/scale/versions/{version}/infer", content=ONE)
            assert answer.json()["model_version"].startswith(version)
            assert answer.json()["outputs"][0]["data"] == [value * WIDTH] * 10
        assert (await client.post(INFER, content=ONE)).json()["model_version"] == first
        shown = (await client.get(f"/v2/models/scale/versions/{second}")).json()
        assert (shown["parameters"]["held"], shown["versions"]) == (True, [first, second])
        assert shown["parameters"]["batching"]["joined"]
        rows = (await client.post("/v2/repository/index")).json()
        assert [(row["version"], row.get("held", False)) for row in rows] == [(first, False), (second, True)]
        models.release("scale", second)
        check_error(await client.post(f"/v2/models/scale/versions/{second}/infer", content=ONE), 404, first)


@pytest.mark.anyio
async def test_a_tenant_takes_its_share_and_no_more(press: Call, repository: Call) -> None:
    press(scale_model(2.0))
    app = create_app(
        repository("scale"), poll_seconds=0, workers=1, limits=Limits(queue=3, body_bytes=CAP, tenant_share=0.5)
    )
    go_on = asyncio.Event()

    async def held() -> AsyncIterator[bytes]:
        yield ONE[:5]
        await go_on.wait()
        yield ONE[5:]

    async def of(tenant: str, body: Any) -> httpx.Response:
        async def known(scope: Any, receive: Any, send: Any) -> None:
            await app(scope | {"modelpress.tenant": tenant}, receive, send)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(known), base_url="http://test") as client:
            return await client.post(INFER, content=body)

    async with app.router.lifespan_context(app):
        first = [asyncio.create_task(of("greedy", held())) for _ in range(2)]
        await asyncio.sleep(0)
        while app.state.inference.places._free > 2:
            await asyncio.sleep(0.001)
        refused = await of("greedy", ONE)
        check_error(refused, 429, "of this tenant")
        assert refused.headers["retry-after"] == "1"
        assert (await of("modest", ONE)).status_code == 200
        go_on.set()
        assert [answer.status_code for answer in await asyncio.gather(*first)] == [200, 200]
        assert (await of("greedy", ONE)).status_code == 200


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=60), st.integers(1, 6), st.floats(0.05, 1))
def test_places_are_neither_lost_nor_made(steps: list[tuple[str, bool]], total: int, share: float) -> None:
    places = Places(total, share)
    open_: dict[str, list[Any]] = {name: [] for name in "abc"}
    for name, enter in steps:
        if not enter:
            if open_[name]:
                open_[name].pop().__exit__(None, None, None)
            continue
        one, here = places.one(name), sum(map(len, open_.values()))
        try:
            one.__enter__()
        except BusyError:
            assert here == total or len(open_[name]) >= max(1, share * total)
        else:
            assert here < total
            open_[name].append(one)
    for ones in open_.values():
        for one in ones:
            one.__exit__(None, None, None)
    assert (places._free, places._held) == (total, {})


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/v2/models/a/infer", ("a", None)),
        ("/v2/models/a/versions/b/infer", ("a", "b")),
        ("/v2/models/infer/infer", ("infer", None)),
        ("/v2/models/a/versions/b", None),
        ("/v2/models//infer", None),
        ("/v2/models/a/versions//infer", None),
        ("/v2/models/a/other/b/infer", None),
        ("/v2/models/a/b/c/d/infer", None),
        ("/v2/models/a/infer/", None),
        ("//v2/models/a/infer", None),
        ("/v1/models/a/infer", None),
        ("infer", None),
        ("", None),
    ],
)
def test_which_paths_are_inference(path: str, found: Any) -> None:
    assert target(path) == found


@pytest.mark.anyio
async def test_requests_that_come_together_get_their_own_answers(press: Call, repository: Call) -> None:
    press(lookup_model(), "lookup")

    def asks(token: int) -> bytes:
        return encode_request(
            {"input_ids": np.array([[token]], np.int64), "attention_mask": np.ones((1, 1, 1), np.float32)}
        )

    async with client_of(repository("lookup"), workers=1) as client:
        path = "/v2/models/lookup/infer"
        found = await asyncio.gather(*(client.post(path, content=asks(token)) for token in range(40)))
        for token, answer in enumerate(found):
            assert answer.json()["outputs"][0]["data"] == [float(token * 8 + column) for column in range(8)]
