"""The server against raw ONNX Runtime on the digits classifier: `python -m benchmarks.serving [--quick] [--json PATH]`.

One process serves a published pack; clients in this process send single images over kept connections, as prepared
bytes on plain sockets, so that what is measured is the server. `onnxruntime` is the same graph called in this process
by as many threads. Client and server share the cores. The weights are untrained: they do not change the time.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from benchmarks._report import Row, main
from modelpress import graph, pointer
from modelpress.checkpoint import Checkpoint
from modelpress.compress import compress
from modelpress.config import CompressConfig, ExportConfig, ShardConfig, WorkloadConfig
from modelpress.export import export
from modelpress.publish import publish
from modelpress.shard import draft_manifest, write_shards
from modelpress.store import Store, open_store
from modelpress.workload import Workload, load_workload
from serving.protocol import encode_request

CLIENTS = (1, 8, 64)
PROMOTION_CLIENTS = 8
Call = Callable[[], object]


def measure(quick: bool) -> Iterator[Row]:
    """Rows of all cases."""
    seconds = 2.0 if quick else 10.0
    workload = load_workload(WorkloadConfig(kind="image-classification", model="digits-cnn", data="digits"))
    models = [_model(workload, seed) for seed in (0, 1)]
    image = {name: tensor.numpy() for name, tensor in workload.example(1).items()}
    session = graph.session(models[0], threads=1)
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(f"{folder}/store")
        packs = [_publish(store, Path(folder, f"shards{i}"), model) for i, model in enumerate(models)]
        pointer.append(store, "digits", "champion", packs[0], "promote")
        request = encode_request(image)
        with _server(store) as (host, port):
            for clients in CLIENTS:
                case = f"digits batch 1, {clients} clients"
                raw = _load(clients, seconds, lambda: lambda: session.run(None, image))
                yield from _rows(case, "onnxruntime", *raw)
                served = _load(clients, seconds, lambda: _caller(host, port, request))
                yield from _rows(case, "modelpress", *served)
            yield from _promotions(store, packs, seconds, lambda: _caller(host, port, request))


def _model(workload: Workload, seed: int) -> Checkpoint:
    torch.manual_seed(seed)
    return export(workload.skeleton({}), workload, ExportConfig())[0]


def _publish(store: Store, folder: Path, checkpoint: Checkpoint) -> str:
    coded, report = compress(checkpoint, CompressConfig())
    shards, _ = write_shards(coded, ShardConfig(), folder)
    manifest, blobs = draft_manifest("digits", coded, shards)
    return publish(store, manifest, shards, blobs, source_bytes=report.raw_bytes).pack


@contextmanager
def _server(store: Store) -> Iterator[tuple[str, int]]:
    command = [sys.executable, "-m", "modelpress.cli", "serve", "digits", "--port", "0", "--poll-seconds", "0.1"]
    process = subprocess.Popen(
        [*command, "--threads", "1"],
        env=os.environ | {"MODELPRESS_STORE": store.uri},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr
        found = next(filter(None, (re.search(r"listening on http://(\S+):(\d+)/v2", line) for line in process.stderr)))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield found[1], int(found[2])
    finally:
        process.terminate()
        process.wait()


def _caller(host: str, port: int, body: bytes) -> Call:
    """One kept connection; each call is one request, and fails unless the answer is whole and 200."""
    connection = socket.create_connection((host, port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    head = f"POST /v2/models/digits/infer HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    request = head.encode() + body

    def call() -> bytes:
        connection.sendall(request)
        answer = connection.recv(65536)
        if not answer.startswith(b"HTTP/1.1 200"):
            raise ConnectionError(answer[:200].decode("latin-1"))
        head, _, rest = answer.partition(b"\r\n\r\n")
        length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])  # type: ignore[index]
        while len(rest) < length:
            rest += connection.recv(65536)
        return rest

    return call


def _load(clients: int, seconds: float, connect: Callable[[], Call]) -> tuple[np.ndarray, float]:
    """Seconds of each call of `clients` threads during `seconds`, and calls per second."""
    times: list[list[float]] = [[] for _ in range(clients)]
    calls = [connect() for _ in range(clients)]
    for call in calls:
        call()
    deadline = time.perf_counter() + seconds

    def work(call: Call, mine: list[float]) -> None:
        while (started := time.perf_counter()) < deadline:
            call()
            mine.append(time.perf_counter() - started)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(calls, times, strict=True)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    flat = np.array(list(itertools.chain.from_iterable(times)))
    return flat, len(flat) / (time.perf_counter() - started)


def _rows(case: str, system: str, times: np.ndarray, per_second: float) -> Iterator[Row]:
    yield Row(case, system, "latency p50", "ms", float(np.quantile(times, 0.5)) * 1e3)
    yield Row(case, system, "latency p99", "ms", float(np.quantile(times, 0.99)) * 1e3)
    yield Row(case, system, "throughput", "1/s", per_second)


def _promotions(store: Store, packs: list[str], seconds: float, connect: Callable[[], Call]) -> Iterator[Row]:
    """Promotions to and fro under load: requests that failed, and the latency meanwhile."""
    done = threading.Event()
    promoted = 0

    def promote() -> None:
        nonlocal promoted
        for pack in itertools.cycle(reversed(packs)):
            if done.wait(0.3):
                return
            pointer.append(store, "digits", "champion", pack, "promote")
            promoted += 1

    failed = 0

    def counted() -> Call:
        call = connect()

        def count() -> None:
            nonlocal failed
            try:
                call()
            except (ConnectionError, ValueError):
                failed += 1

        return count

    promoter = threading.Thread(target=promote)
    promoter.start()
    times, per_second = _load(PROMOTION_CLIENTS, seconds, counted)
    done.set()
    promoter.join()
    case = f"digits batch 1, {PROMOTION_CLIENTS} clients, during promotions"
    yield from _rows(case, "modelpress", times, per_second)
    yield Row(case, "modelpress", "promotions", "1", float(promoted))
    yield Row(case, "modelpress", "failed requests", "1", float(failed))


if __name__ == "__main__":
    main("serving", measure)
