"""Clients that others wrote, against a real server process: Triton's over HTTP and gRPC, and KServe's."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from modelpress import __version__
from modelpress.store import open_store
from tests.serving.conftest import CLASSES, WIDTH, Server, lookup_model, publish_pack, scale_model
from tests.serving.rpc.test_service import free_port

KSERVE = os.environ.get("MODELPRESS_TEST_KSERVE_PYTHON")


class Served:
    """One server for all tests of this module."""

    def __init__(self, folder: Any) -> None:
        store = open_store(str(folder.mktemp("store")))
        self.pack = publish_pack(store, folder.mktemp("scale"), scale_model(2.0), "scale")
        publish_pack(store, folder.mktemp("lookup"), lookup_model(), "lookup")
        port = free_port()
        self.server = Server(store, MODELPRESS_SERVING_GRPC_PORT=str(port))
        self.http, self.grpc = self.server.url.removeprefix("http://"), f"127.0.0.1:{port}"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory)
    yield made
    assert made.server.stop() == 0


@pytest.fixture(params=["http", "grpc"])
def triton(request: pytest.FixtureRequest, served: Served) -> Iterator[tuple[Any, Any]]:
    """Triton's module and client, over either."""
    module = pytest.importorskip(f"tritonclient.{request.param}")
    client = module.InferenceServerClient(served.http if request.param == "http" else served.grpc)
    yield module, client
    client.close()


def test_triton_s_client_is_told_all_it_asks(triton: tuple[Any, Any], served: Served) -> None:
    module, client = triton
    over_http = module.__name__.endswith("http")
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("scale")
    assert client.is_model_ready("scale", served.pack)
    as_json = {} if over_http else {"as_json": True}
    assert client.get_server_metadata(**as_json)["version"] == __version__
    shown = client.get_model_metadata("scale", **as_json)
    assert shown["versions"] == [served.pack]
    assert [int(size) for size in shown["inputs"][0]["shape"]] == [-1, WIDTH]
    index = client.get_model_repository_index(**as_json)
    assert {row["name"] for row in (index if over_http else index["models"])} == {"scale", "lookup"}
    client.unload_model("lookup")
    assert not client.is_model_ready("lookup")
    client.load_model("lookup")
    assert client.is_model_ready("lookup")


@pytest.mark.parametrize("rows", [1, 700])
def test_triton_s_client_gets_the_model_s_answers(triton: tuple[Any, Any], served: Served, rows: int) -> None:
    module, client = triton
    data = np.random.default_rng(0).normal(size=(rows, WIDTH)).astype(np.float32)
    tensor = module.InferInput("x", list(data.shape), "FP32")
    tensor.set_data_from_numpy(data)
    expected = np.repeat(2 * data.sum(1, keepdims=True), CLASSES, 1)
    for outputs in (None, [module.InferRequestedOutput("y")]):
        found = client.infer("scale", [tensor], outputs=outputs, request_id="7", timeout=60_000_000)
        assert np.allclose(found.as_numpy("y"), expected, atol=1e-4)
        answer = found.get_response()
        version = answer["model_version"] if isinstance(answer, dict) else answer.model_version
        assert version == served.pack


def test_triton_s_client_over_http_with_tensors_as_json(served: Served) -> None:
    module = pytest.importorskip("tritonclient.http")
    with module.InferenceServerClient(served.http) as client:
        data = np.array([[3, 5]], np.int64)
        ids = module.InferInput("input_ids", [1, 2], "INT64")
        ids.set_data_from_numpy(data, binary_data=False)
        mask = module.InferInput("attention_mask", [1, 2, 1], "FP32")
        mask.set_data_from_numpy(np.ones((1, 2, 1), np.float32))  # binary, beside one in JSON
        for binary in (True, False):
            wanted = [module.InferRequestedOutput("y", binary_data=binary)]
            found = client.infer("lookup", [ids, mask], outputs=wanted).as_numpy("y")
            assert found[0, 1].tolist() == [float(value) for value in range(40, 48)]


def test_triton_s_client_is_told_what_is_wrong(triton: tuple[Any, Any]) -> None:
    module, client = triton
    utils = pytest.importorskip("tritonclient.utils")
    tensor = module.InferInput("x", [1, 3], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 3), np.float32))
    with pytest.raises(utils.InferenceServerException, match=r"\[-1, 64\]"):
        client.infer("scale", [tensor])
    with pytest.raises(utils.InferenceServerException, match="one of"):
        client.infer("nobody", [tensor])
    tensor = module.InferInput("x", [1, WIDTH], "FP32")
    tensor.set_data_from_numpy(np.ones((1, WIDTH), np.float32))
    with pytest.raises(utils.InferenceServerException, match="not served"):
        client.infer("scale", [tensor], outputs=[module.InferRequestedOutput("y", class_count=2)])


KSERVE_CLIENT = """
import asyncio, json, sys
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

url, address = sys.argv[1:]

def ask(binary):
    data = np.ones((2, 64), np.float32)
    tensor = InferInput("x", [2, 64], "FP32")
    tensor.set_data_from_numpy(data, binary_data=binary)
    return InferRequest("scale", [tensor], request_id="7")

async def main():
    rest = InferenceRESTClient(RESTConfig(protocol="v2"))
    found = {"ready": await rest.is_server_ready(url), "model": await rest.is_model_ready(url, "scale")}
    for binary in (True, False):
        answer = await rest.infer(url, ask(binary), model_name="scale")
        found[f"rest {binary}"] = np.asarray(answer.outputs[0].as_numpy()).ravel().tolist()
    calls = InferenceGRPCClient(address)
    found["live"] = await calls.is_server_live()
    for binary in (True, False):
        answer = await calls.infer(ask(binary))
        found[f"grpc {binary}"] = np.asarray(answer.outputs[0].as_numpy()).ravel().tolist()
    print(json.dumps(found))

asyncio.run(main())
"""


@pytest.mark.skipif(not KSERVE, reason="MODELPRESS_TEST_KSERVE_PYTHON names no environment with kserve")
def test_kserve_s_client(served: Served) -> None:
    done = subprocess.run(
        [str(KSERVE), "-c", KSERVE_CLIENT, f"http://{served.http}", served.grpc],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    expected = [2.0 * WIDTH] * 2 * CLASSES
    ways = {f"{way} {binary}": expected for way in ("rest", "grpc") for binary in (True, False)}
    assert found == ways | {"ready": True, "model": True, "live": True}
