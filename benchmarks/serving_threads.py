"""Threads and memory of the server, by measurement: `python -m benchmarks.serving_threads [--quick] [--write]`.

The grid that the defaults of `modelpress serve` were chosen from: inferences at a time × threads of each, with threads
that spin while they wait and with threads that sleep, and ONNX Runtime's arena and memory patterns. Beside latency and
throughput stands the processor time of one answer, all of the server's process: it says what spinning costs others.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from benchmarks._report import Row, main
from benchmarks.serving import load
from benchmarks.serving.__main__ import case, rows
from benchmarks.serving.load import Job
from benchmarks.serving.models import Model, digits, encoder, publish_model, server
from modelpress.cores import usable_cores
from modelpress.store import Store, open_store

CLIENTS = (1, 64)
TUNE = "import serving.engine, modelpress.graph\nserving.engine.TUNING = modelpress.graph.Tuning({})"


def measure(quick: bool) -> Iterator[Row]:
    """The grid for both models."""
    seconds, cores = (1.0 if quick else 6.0), usable_cores()
    sizes = sorted({(1, 1), (cores, 1), (1, cores), (cores, cores)})
    with tempfile.TemporaryDirectory() as folder:
        for model in (digits(), encoder()):
            store = open_store(f"{folder}/{model.name}/store")
            publish_model(store, Path(folder, model.name, "shards"), model)
            for workers, threads in sizes:
                for spinning in (True, False):
                    how = "spinning" if spinning else "sleeping"
                    system = f"{workers} x {threads}, {how}"
                    yield from _served(store, model, system, workers, threads, f"spinning={spinning}", seconds)
            for name, choice in (
                ("no arena", "spinning=False, arena=False"),
                ("no memory patterns", "spinning=False, memory_pattern=False"),
            ):
                yield from _served(store, model, f"{cores} x 1, sleeping, {name}", cores, 1, choice, seconds)


def _served(
    store: Store, model: Model, system: str, workers: int, threads: int, tuning: str, seconds: float
) -> Iterator[Row]:
    settings = {"MODELPRESS_SERVING_WORKERS": workers, "MODELPRESS_SERVING_THREADS": threads}
    with server(store, settings, TUNE.format(tuning)) as running:
        process = psutil.Process(running.process.pid)
        for clients in CLIENTS:
            job = Job(running.host, running.port, f"/v2/models/{model.name}/infer", model.request, clients, seconds)
            load.run(Job(**job.__dict__ | {"seconds": 0.5}))
            before = sum(process.cpu_times()[:2])
            found = load.run(job)
            spent = sum(process.cpu_times()[:2]) - before
            yield from rows(case(model, clients), system, found)
            yield Row(case(model, clients), system, "processor time of an answer", "ms", spent / found.count * 1e3)
            yield Row(case(model, clients), system, "memory", "MiB", process.memory_info().rss / 2**20)


if __name__ == "__main__":
    main("serving_threads", measure, note="Systems: inferences at a time x threads of each.\n")
