"""Texts and images to a served pack that brings its processing: what a client sends, what it gets, what is refused."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import weakref
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
import tokenizers
from onnx import TensorProto, helper
from PIL import Image

from modelpress import graph
from modelpress.checkpoint import Checkpoint
from modelpress.process import PROCESSING_FILE, ImageInput, MeanPool, Normalize, Processing, Softmax, TextInput, TopK
from modelpress.store import Store
from serving.app import create_app
from tests.serving.canaries import Place
from tests.serving.conftest import Server, client_of, lookup_model, scale_model
from tests.serving.test_app import check_error

Call = Callable[..., Any]
pytestmark = pytest.mark.anyio
TEXT, IMAGE = "/v2/models/words:processed", "/v2/models/squares:processed"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def words(seed: int = 0, max_length: int = 6) -> Checkpoint:
    """Token ids to rows of a table, which the processing pools over the mask and normalises."""
    rows = np.random.default_rng(seed).normal(size=(100, 8)).astype(np.float32)
    shape = ["batch", "length"]
    ids, mask = (helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in ("ids", "mask"))
    nodes = [helper.make_node("Gather", ["table", "ids"], ["hidden"]), helper.make_node("Identity", ["mask"], ["seen"])]
    outputs = [
        helper.make_tensor_value_info("hidden", TensorProto.FLOAT, [*shape, 8]),
        helper.make_tensor_value_info("seen", TensorProto.INT64, shape),
    ]
    body = helper.make_graph(nodes, "words", [ids, mask], outputs, [onnx.numpy_helper.from_array(rows, "table")])
    split = graph.split(helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[PAD]": 0, "[UNK]": 1, "cat": 2, "dog": 3}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    given = TextInput(max_length=max_length, ids="ids", mask="mask")
    spec = Processing(input=given, steps=(MeanPool(of="hidden"), Normalize(of="embedding")))
    files = {PROCESSING_FILE: spec.to_bytes(), "tokenizer.json": tokenizer.to_str().encode()}
    return replace(split, files=split.files | files)


def squares() -> Checkpoint:
    """Pixels, flattened, times weights: logits of three classes."""
    weight = onnx.numpy_helper.from_array(np.random.default_rng(1).normal(size=(768, 3)).astype(np.float32), "weight")
    x = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, 16, 16])
    y = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])
    nodes = [
        helper.make_node("Flatten", ["pixels"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
    ]
    body = helper.make_graph(nodes, "squares", [x], [y], [weight])
    split = graph.split(helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))
    steps = (Softmax(of="logits"), TopK(of="probabilities", k=2))
    spec = Processing(input=ImageInput(pixels="pixels", height=16, width=16), steps=steps)
    files = {PROCESSING_FILE: spec.to_bytes(), "labels.json": b'["red", "green", "blue"]'}
    return replace(split, files=split.files | files)


@pytest.fixture
async def client(press: Call, repository: Call) -> AsyncIterator[httpx.AsyncClient]:
    press(words(), "words")
    press(squares(), "squares")
    press(scale_model(2.0))
    async with client_of(repository()) as made:
        yield made


def asked(name: str, data: list[str]) -> dict[str, Any]:
    return {"inputs": [{"name": name, "datatype": "BYTES", "shape": [len(data)], "data": data}]}


def outputs(answer: httpx.Response) -> dict[str, dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    return {one["name"]: one for one in answer.json()["outputs"]}


async def test_a_text_is_answered_with_an_embedding(client: httpx.AsyncClient) -> None:
    found = outputs(
        await client.post(f"{TEXT}/infer", json=asked("text", ["cat dog", "dog", "cat dog cat dog cat dog cat"]))
    )
    assert (found["embedding"]["datatype"], found["embedding"]["shape"]) == ("FP32", [3, 8])
    table = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32)
    expected = np.stack([table[[2, 3]].mean(0), table[3], table[[2, 3, 2, 3, 2, 3]].mean(0)])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.allclose(np.reshape(found["embedding"]["data"], (3, 8)), expected, atol=1e-5)


async def test_the_same_tokens_get_the_same_answer(client: httpx.AsyncClient) -> None:
    """The model itself answers beside it, for who makes tensors."""
    processed = await client.post(f"{TEXT}/infer", json=asked("text", ["cat dog"]))
    tensors = [{"name": name, "datatype": "INT64", "shape": [1, 2], "data": data} for name, data in
               (("ids", [2, 3]), ("mask", [1, 1]))]  # fmt: skip
    plain = outputs(await client.post("/v2/models/words/infer", json={"inputs": tensors}))
    mean = np.reshape(plain["hidden"]["data"], (2, 8)).mean(0)
    assert np.allclose(outputs(processed)["embedding"]["data"], mean / np.linalg.norm(mean), atol=1e-6)
    assert processed.json()["model_name"] == "words:processed"
    assert processed.json()["model_version"] == (await client.get(TEXT)).json()["versions"][0]


async def test_outputs_can_be_chosen(client: httpx.AsyncClient) -> None:
    body = asked("text", ["cat"]) | {"outputs": [{"name": "seen"}]}
    assert list(outputs(await client.post(f"{TEXT}/infer", json=body))) == ["seen"]
    body = asked("text", ["cat"]) | {"outputs": [{"name": "hidden"}]}  # it was pooled
    check_error(await client.post(f"{TEXT}/infer", json=body), 400, "embedding")


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((40, 30, 3), 128, np.uint8)).save(buffer, "png")
    return buffer.getvalue()


async def test_an_image_is_answered_with_names_of_classes(client: httpx.AsyncClient) -> None:
    body = asked("image", [base64.b64encode(picture()).decode()])
    found = outputs(await client.post(f"{IMAGE}/infer", json=body))
    logits = np.full(768, 128 / 255) @ np.random.default_rng(1).normal(size=(768, 3)).astype(np.float32)
    order = np.argsort(-logits)[:2]
    assert (found["labels"]["datatype"], found["labels"]["shape"]) == ("BYTES", [1, 2])
    assert found["labels"]["data"] == [["red", "green", "blue"][at] for at in order]
    assert np.allclose(found["logits"]["data"], logits, rtol=1e-3)
    assert sum(found["probabilities"]["data"]) == pytest.approx(1, abs=1e-5)


async def test_an_image_may_come_as_binary_tensor_data(client: httpx.AsyncClient) -> None:
    """As clients of Triton send it: a length of four bytes, and the file."""
    data = len(picture()).to_bytes(4, "little") + picture()
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(data)}}
    header = json.dumps({"inputs": [tensor]}).encode()
    length = {"Inference-Header-Content-Length": str(len(header))}
    found = outputs(await client.post(f"{IMAGE}/infer", content=header + data, headers=length))
    as_json = asked("image", [base64.b64encode(picture()).decode()])
    assert found == outputs(await client.post(f"{IMAGE}/infer", json=as_json))


async def test_it_is_a_model_of_its_own_in_all_lists(client: httpx.AsyncClient) -> None:
    shown = (await client.get(TEXT)).json()
    assert shown["name"] == "words:processed"
    assert shown["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
    assert shown["outputs"] == [
        {"name": "seen", "datatype": "INT64", "shape": [-1, -1]},
        {"name": "embedding", "datatype": "FP32", "shape": [-1, 8]},
    ]
    assert shown["parameters"]["pack"] == shown["versions"][0]
    assert (await client.get("/v2/models/words")).json()["parameters"]["processed"] == "words:processed"
    assert "processed" not in shown["parameters"]
    assert "processed" not in (await client.get("/v2/models/scale")).json()["parameters"]
    assert (await client.get(f"{TEXT}/ready")).json() == {"name": "words:processed", "ready": True}
    rows = {row["name"]: row["state"] for row in (await client.post("/v2/repository/index")).json()}
    assert set(rows) == {"words", "words:processed", "squares", "squares:processed", "scale"}
    digest = shown["versions"][0]
    assert (await client.get(f"{TEXT}/versions/{digest[:12]}")).json() == shown
    quoted = await client.post("/v2/models/words%3Aprocessed/infer", json=asked("text", ["cat"]))
    assert quoted.status_code == 200


async def test_a_pack_without_processing_has_no_second_model(client: httpx.AsyncClient) -> None:
    check_error(await client.get("/v2/models/scale:processed"), 404, "without processing")
    check_error(await client.post("/v2/models/scale:processed/infer", json=asked("text", ["cat"])), 404)
    check_error(await client.get("/v2/models/nobody:processed"), 404)
    check_error(await client.get("/v2/models/words:processed:processed"), 404)
    check_error(await client.post("/v2/repository/models/words:processed/unload"), 404)


@pytest.mark.parametrize(
    ("url", "body", "said"),
    [
        (TEXT, asked("text", ["cat " * 70_000]), "at most 131072"),
        (TEXT, asked("image", ["cat"]), "text"),
        (TEXT, asked("text", []), "[-1]"),
        (TEXT, {"inputs": [{"name": "text", "datatype": "FP32", "shape": [1], "data": [1.0]}]}, "BYTES"),
        (TEXT, {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": [1]}]}, "text"),
        (IMAGE, asked("image", ["cat"]), "a whole PNG or JPEG"),
        (IMAGE, asked("image", ["iVBORw0KGgo="]), "a whole PNG or JPEG"),
        (IMAGE, asked("image", ["iVBOR" + "ä"]), "base64"),
    ],
)
async def test_what_can_not_be_processed_is_the_clients_to_mend(
    press: Call, repository: Call, url: str, body: Any, said: str
) -> None:
    press(words(), "words")
    press(squares(), "squares")
    models = repository()
    app = create_app(models, poll_seconds=0.0, workers=1)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        check_error(await client.post(f"{url}/infer", json=body), 400, said)
        assert models.ready


async def test_bytes_that_are_no_text_are_refused(client: httpx.AsyncClient) -> None:
    data = (2).to_bytes(4, "little") + b"\xff\xfe"
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(data)}}
    header = json.dumps({"inputs": [tensor]}).encode()
    length = {"Inference-Header-Content-Length": str(len(header))}
    check_error(await client.post(f"{TEXT}/infer", content=header + data, headers=length), 400, "UTF-8")


@pytest.mark.parametrize(
    "files",
    [
        {PROCESSING_FILE: b"{}"},
        {PROCESSING_FILE: Processing(input=TextInput(max_length=8)).to_bytes()},
        {"tokenizer.json": b"{}"},
    ],
    ids=["no description", "another graph's", "no tokenizer"],
)
async def test_processing_that_does_not_fit_is_a_failure_of_the_pack(
    press: Call, repository: Call, files: dict[str, bytes]
) -> None:
    first = press(words(), "words")
    models = repository("words")
    broken = words()
    press(replace(broken, files=broken.files | files), "words")
    models.poll()
    assert models.model("words").answering().engine.pack == first
    assert "pointer 2 can't be loaded" in models.index()[0]["reason"]


async def test_an_engine_goes_with_its_last_request_also_behind_its_front(press: Call, repository: Call) -> None:
    press(words(), "words")
    models = repository("words")
    held: Any = models.asked("words:processed").answering()
    engine = weakref.ref(models.model("words").answering().engine)
    press(lookup_model(), "words")
    gc.disable()  # it must go by itself
    try:
        models.poll()
        prepared = held.engine.prepare({"text": np.array([b"cat"], object)})
        found = held.behind.engine.infer(prepared, held.engine.graph_outputs)
        assert held.engine.finish(found, prepared, ["embedding"])["embedding"].shape == (1, 8)
        del held
        assert engine() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("max_length", "both"), [(6, True), (7, False)])
async def test_texts_take_part_in_a_canary_of_the_same_tokenizer(
    store: Store, press: Call, repository: Call, max_length: int, both: bool
) -> None:
    packs = press(words(0), "scale"), press(words(1, max_length), "scale", alias=None)
    one = Place(store, repository("scale"), *packs)
    one.begin({"mode": "canary", "share": 0.5})
    expected = {}
    for pack, seed in ((one.first, 0), (one.second, 1)):
        row = np.random.default_rng(seed).normal(size=(100, 8)).astype(np.float32)[2]
        expected[pack] = row / np.linalg.norm(row)
    async with one.client() as client:
        seen = set()
        for number in range(40):
            key = {"modelpress-canary-key": f"client {number}"}
            answer = await client.post("/v2/models/scale:processed/infer", json=asked("text", ["cat"]), headers=key)
            pack = answer.json()["model_version"]
            assert np.allclose(outputs(answer)["embedding"]["data"], expected[pack], atol=1e-5)
            assert answer.headers["modelpress-pack"] == pack
            seen.add(pack)
        assert seen == ({one.first, one.second} if both else {one.first})
        counted = one.seen().of(0)
        assert (counted.candidate.requests > 0) is both


async def test_texts_of_many_clients_get_each_its_own_answer(client: httpx.AsyncClient) -> None:
    """Their tensors are joined, where they are of one length."""
    texts = ["cat", "dog", "cat dog", "dog cat", "cat cat dog"] * 8
    answers = await asyncio.gather(*(client.post(f"{TEXT}/infer", json=asked("text", [text])) for text in texts))
    table = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32)
    for text, answer in zip(texts, answers, strict=True):
        mean = table[[2 if word == "cat" else 3 for word in text.split()]].mean(0)
        assert np.allclose(outputs(answer)["embedding"]["data"], mean / np.linalg.norm(mean), atol=1e-5)


def test_tritons_client_sends_texts_and_images(press: Call, serve: Call) -> None:
    """A client that nobody here wrote, over a socket, to a process of its own."""
    import tritonclient.http as triton

    press(words(), "words")
    press(squares(), "squares")
    server: Server = serve()
    client = triton.InferenceServerClient(server.url.removeprefix("http://"))
    assert client.is_model_ready("words:processed")
    assert client.get_model_metadata("words:processed")["inputs"][0]["datatype"] == "BYTES"
    text = triton.InferInput("text", [2], "BYTES")
    text.set_data_from_numpy(np.array([b"cat dog", "ä".encode()], dtype=object))
    found = client.infer("words:processed", [text]).as_numpy("embedding")
    assert found.shape == (2, 8)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    image = triton.InferInput("image", [1], "BYTES")
    image.set_data_from_numpy(np.array([picture()], dtype=object))
    assert set(client.infer("squares:processed", [image]).as_numpy("labels")[0]) < {b"red", b"green", b"blue"}
    client.close()
    assert server.stop() == 0
