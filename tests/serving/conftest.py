"""Small real packs, and real server processes over them."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from modelpress import graph, pointer
from modelpress.checkpoint import Checkpoint
from modelpress.compress import compress
from modelpress.config import CompressConfig, ShardConfig
from modelpress.publish import publish
from modelpress.shard import draft_manifest, write_shards
from modelpress.store import Store, open_store
from serving.app import create_app
from serving.canary import Canaries
from serving.infer import Limits
from serving.repository import Repository
from tests import warm

WIDTH, CLASSES = 64, 10
START_SECONDS = 60.0
CAP = 200_000
"""On bodies, in bytes, of the servers without a socket."""


def scale_model(value: float) -> Checkpoint:
    """`y = x · W` with every weight `value`: which pack answered can be read off each number of its answer."""
    weight = onnx.numpy_helper.from_array(np.full((WIDTH, CLASSES), value, np.float32), "weight")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", CLASSES])
    body = helper.make_graph([helper.make_node("MatMul", ["x", "weight"], ["y"])], "scale", [x], [y], [weight])
    return graph.split(helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


def lookup_model() -> Checkpoint:
    """Token ids and a mask to vectors: two inputs with shared axes, and an index that can lie outside the table."""
    rows = np.arange(100 * 8, dtype=np.float32).reshape(100, 8)
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.FLOAT, ["batch", "length", 1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length", 8])
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Mul", ["rows", "attention_mask"], ["y"]),
    ]
    body = helper.make_graph(nodes, "lookup", [ids, mask], [y], [onnx.numpy_helper.from_array(rows, "table")])
    return graph.split(helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


def publish_pack(store: Store, folder: Path, checkpoint: Checkpoint, name: str, alias: str | None = "champion") -> str:
    """Compress, shard and publish; point `alias` at the pack; return its digest."""
    coded, report = compress(checkpoint, CompressConfig())
    shards, _ = write_shards(coded, ShardConfig(), folder)
    manifest, blobs = draft_manifest(name, coded, shards)
    pack = publish(store, manifest, shards, blobs, source_bytes=report.raw_bytes).pack
    if alias:
        pointer.append(store, name, alias, pack, "promote")
    return pack


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def press(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    def press(checkpoint: Checkpoint, name: str = "scale", alias: str | None = "champion") -> str:
        return publish_pack(store, tmp_path_factory.mktemp("shards"), checkpoint, name, alias)

    return press


@pytest.fixture
def repository(store: Store) -> Callable[..., Repository]:
    def make(*models: str) -> Repository:
        made = Repository(store, models, threads=1, retry_seconds=0.0)
        made.start()
        return made

    return make


@asynccontextmanager
async def client_of(
    repository: Repository,
    poll_seconds: float = 0.0,
    workers: int = 2,
    max_queue: int = 64,
    canaries: Canaries | None = None,
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application, without a socket."""
    limits = Limits(queue=max_queue, body_bytes=CAP)
    app = create_app(repository, poll_seconds=poll_seconds, workers=workers, limits=limits, canaries=canaries)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        yield client


class Server:
    """A `modelpress serve` process on a free port."""

    def __init__(self, store: Store, *arguments: str, **environment: str) -> None:
        options = ["--port", "0", "--poll-seconds", "0.1", "--threads", "1"]
        env = os.environ | {"MODELPRESS_STORE": store.uri} | environment
        self.process = warm.servers().start("serve", *options, *arguments, env=env)
        self.url, self.lines = "", list[str]()
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._listening.wait(START_SECONDS) or not self.url:
            self.process.kill()
            raise AssertionError("".join(self.lines))
        self.client = httpx.Client(base_url=self.url, timeout=30)

    def _read(self) -> None:
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"listening on (https?://\S+?)/v2", line):
                self.url = found[1]
                self._listening.set()
        self._listening.set()

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(30)
        self._reader.join(10)
        self.client.close()
        return code


@pytest.fixture
def serve(store: Store) -> Iterator[Callable[..., Server]]:
    running: list[Server] = []

    def start(*arguments: str, **environment: str) -> Server:
        running.append(Server(store, *arguments, **environment))
        return running[-1]

    yield start
    for server in running:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
