"""The server beside the peers and raw ONNX Runtime: `python -m benchmarks.serving [--quick] [--write]`.

Every system serves the same ONNX graph with one intra-operator thread per inference, and gets the same requests over
kept connections from the same client (`benchmarks.serving.load`), which has a process of its own and shares the cores
with the server. `onnxruntime` is the graph called in one process by as many threads as there are cores: no server can
be faster. Beside this: `python -m benchmarks.serving.promotions`, `.soak` and `.malformed`.

The peers' environments: `MODELPRESS_BENCHMARK_PEERS=FOLDER python -m benchmarks.serving --make-peers`.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks._report import Row, main
from benchmarks.serving import load, peers
from benchmarks.serving.load import Job, Load
from benchmarks.serving.models import Model, digits, encoder, publish_model, server
from modelpress import graph
from modelpress.cores import usable_cores
from modelpress.store import open_store

CLIENTS = (1, 8, 64)
WARM_UP_SECONDS = 1.0
NOTE = """Latencies are the client's. `client` is what the client sends at most, to a server that only sends bytes back.
Triton is not here: it is a container, and its published figures are for GPUs.
"""


def measure(quick: bool) -> Iterator[Row]:
    """Rows of both models."""
    seconds = 1.0 if quick else 10.0
    with tempfile.TemporaryDirectory() as folder:
        for model, others in ((digits(), peers.names()), (encoder(), [])):
            yield from _raw(model, seconds)
            yield from _ours(model, Path(folder, model.name), seconds)
            for system in others:
                yield from _peer(system, model, Path(folder, system.replace(" ", "-")), seconds)
        yield from _client(digits(), seconds)


def _ours(model: Model, folder: Path, seconds: float) -> Iterator[Row]:
    store = open_store(str(folder / "store"))
    publish_model(store, folder / "shards", model)
    body, header = model.binary()
    ways = {
        "modelpress": (model.request, {}),
        "modelpress, binary": (body, {"Inference-Header-Content-Length": str(header)}),
    }
    with server(store, {"MODELPRESS_SERVING_THREADS": 1}) as running:
        for system, (request, headers) in ways.items():
            for clients in CLIENTS:
                path = f"/v2/models/{model.name}/infer"
                job = Job(running.host, running.port, path, request, clients, seconds, headers=headers)
                yield from rows(case(model, clients), system, _warm(job))


def _peer(system: str, model: Model, folder: Path, seconds: float) -> Iterator[Row]:
    with peers.peer(system, model, folder) as started:
        for clients in CLIENTS:
            found = None
            if started is not None:
                job = Job(
                    "127.0.0.1", started.port, started.path, started.body, clients, seconds, headers=started.headers
                )
                found = _warm(job)
            yield from rows(case(model, clients), system, found)


def _warm(job: Job) -> Load:
    load.run(Job(**job.__dict__ | {"seconds": WARM_UP_SECONDS}))
    return load.run(job)


def _client(model: Model, seconds: float) -> Iterator[Row]:
    with load.canned(b"x" * 300) as (host, port):
        for clients in CLIENTS:
            job = Job(host, port, "/", model.request, clients, seconds)
            yield from rows(case(model, clients), "client", load.run(job))


def _raw(model: Model, seconds: float) -> Iterator[Row]:
    """The graph alone: as many threads as there are clients, and at most as there are cores."""
    session = graph.session(model.checkpoint, threads=1)
    for clients in CLIENTS:
        times: list[list[float]] = [[] for _ in range(min(clients, usable_cores()))]
        started = time.perf_counter()
        end = started + seconds

        def work(mine: list[float], end: float = end) -> None:
            while (begun := time.perf_counter()) < end:
                session.run(None, model.inputs)
                mine.append(time.perf_counter() - begun)

        threads = [threading.Thread(target=work, args=(mine,)) for mine in times]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took, flat = time.perf_counter() - started, np.concatenate([np.array(mine) for mine in times])
        yield Row(case(model, clients), "onnxruntime", "latency p50", "ms", float(np.quantile(flat, 0.5)) * 1e3)
        yield Row(case(model, clients), "onnxruntime", "latency p99", "ms", float(np.quantile(flat, 0.99)) * 1e3)
        yield Row(case(model, clients), "onnxruntime", "throughput", "1/s", len(flat) / took)


def case(model: Model, clients: int) -> str:
    """What the rows are of."""
    return f"{model.name}, {clients} client{'s' if clients > 1 else ''}"


def rows(case: str, system: str, found: Load | None) -> Iterator[Row]:
    """Of one load; of none, that nothing was measured."""
    if found is None:
        yield Row(case, system, "throughput", "1/s", None)
        return
    yield Row(case, system, "latency p50", "ms", found.p50_seconds * 1e3)
    yield Row(case, system, "latency p99", "ms", found.p99_seconds * 1e3)
    yield Row(case, system, "throughput", "1/s", found.per_second)
    yield Row(case, system, "failed", "1", float(found.failed))


if __name__ == "__main__":
    if "--make-peers" in sys.argv:
        peers.make()
    else:
        main("serving", measure, note=NOTE)
