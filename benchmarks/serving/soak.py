"""A million requests: `python -m benchmarks.serving.soak [--quick] [--write]`.

64 clients in ten parts, JSON and binary tensors in turn; after each part, what the server's process holds of memory.
The run fails on a failed request, or where memory grew by more than `GROWTH` from the second part to the last.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from benchmarks._report import Row, main
from benchmarks.serving import load
from benchmarks.serving.load import Job
from benchmarks.serving.models import digits, publish_model, server
from modelpress.store import open_store

CLIENTS, PARTS = 64, 10
GROWTH = 1.05
HOUR = 3600.0


def measure(quick: bool) -> Iterator[Row]:
    """A row for each part, and for all."""
    requests = 20_000 if quick else 1_000_000
    model = digits()
    body, header = model.binary()
    ways = [(model.request, {}), (body, {"Inference-Header-Content-Length": str(header)})]
    memory, failed, count, took = list[int](), 0, 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(f"{folder}/store")
        publish_model(store, Path(folder, "shards"), model)
        with server(store, {"MODELPRESS_SERVING_THREADS": 1}) as running:
            process = psutil.Process(running.process.pid)
            for part in range(PARTS):
                request, headers = ways[part % 2]
                path, share = "/v2/models/digits/infer", requests // PARTS
                job = Job(running.host, running.port, path, request, CLIENTS, HOUR, share, headers)
                found = load.run(job)
                memory.append(process.memory_info().rss)
                failed, count, took = failed + found.failed, count + found.count, took + found.seconds
                case = f"digits, {CLIENTS} clients"
                yield Row(case, f"part {part + 1}", "answers", "1", float(found.count))
                yield Row(case, f"part {part + 1}", "latency p99", "ms", found.p99_seconds * 1e3)
                yield Row(case, f"part {part + 1}", "memory", "MiB", memory[-1] / 2**20)
    yield Row(case, "all", "answers", "1", float(count))
    yield Row(case, "all", "throughput", "1/s", count / took)
    yield Row(case, "all", "failed", "1", float(failed))
    yield Row(case, "all", "memory, last to second", "1", memory[-1] / memory[1])
    if failed or count != requests or memory[-1] > GROWTH * memory[1]:
        sys.exit(f"{failed} failed, {count} of {requests} answered, memory {memory}")


if __name__ == "__main__":
    main("serving.soak", measure)
