"""Promotions under full load: `python -m benchmarks.serving.promotions [--quick] [--write]`.

64 clients ask without pause while the champion is changed a hundred times between two packs whose answers differ. Each
answer is looked at: it must be 200, and its numbers those of the pack that it names. A swap lasts from the write of the
pointer to the moment when the server's metadata name the new pack; the server looks at the pointer 20 times a second,
so that it is the load that takes the time. The p99 of the answers in swaps stands beside the p99 before the first. The
clients ask until the last swap is done. The run fails on a failed or mixed answer, and where a swap was not followed.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np

from benchmarks._report import Row, main
from benchmarks.serving import load
from benchmarks.serving.load import Job, Load
from benchmarks.serving.models import digits, publish_model, server
from modelpress import pointer
from modelpress.store import Store, open_store

CLIENTS = 64
PAUSE_SECONDS = 0.2
SWAP_SECONDS = 60.0
"""Generous: what a swap may take on a machine that has no core to spare."""


def measure(quick: bool) -> Iterator[Row]:
    """Rows of the time before, of the swaps, and of both."""
    promotions, before_seconds = (10, 2.0) if quick else (100, 15.0)
    models = [digits(seed) for seed in (0, 1)]
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(f"{folder}/store")
        packs = [
            publish_model(store, Path(folder, f"shards{number}"), model, champion=not number)
            for number, model in enumerate(models)
        ]
        expected = {pack: model.answer() for pack, model in zip(packs, models, strict=True)}
        settings = {"MODELPRESS_SERVING_THREADS": 1, "MODELPRESS_SERVING_POLL_SECONDS": 0.05}
        with server(store, settings) as running, ThreadPoolExecutor(1) as pool:
            url = f"http://{running.host}:{running.port}/v2/models/digits"
            path, body = "/v2/models/digits/infer", models[0].request
            job = Job(running.host, running.port, path, body, CLIENTS, before_seconds, expected=expected)
            before = load.run(job)
            done, most = Path(folder, "done"), promotions * (SWAP_SECONDS + PAUSE_SECONDS)
            asking = pool.submit(load.run, dataclasses.replace(job, seconds=most, until=str(done)))
            try:
                swaps = list(_promote(store, packs, promotions, url, asking))
            finally:
                done.touch()
            during = asking.result()
    yield from _rows(before, during, swaps, promotions)


def _promote(
    store: Store, packs: list[str], most: int, url: str, asking: Future[Load]
) -> Iterator[tuple[float, float]]:
    """When each swap began and ended."""
    time.sleep(1.0)  # the clients are connected
    with httpx.Client(timeout=SWAP_SECONDS) as client:
        for number in range(most):
            began, pack = time.monotonic(), packs[(number + 1) % 2]
            pointer.append(store, "digits", "champion", pack, "promote")
            while client.get(url).json()["versions"][0] != pack:
                if time.monotonic() - began > SWAP_SECONDS:
                    raise RuntimeError(f"promotion {number} was not followed in {SWAP_SECONDS:.0f} s")
                time.sleep(0.02)
            yield began, time.monotonic()
            if asking.done():
                raise RuntimeError(f"the clients ended before promotion {number}: {asking.result().first_failure}")
            time.sleep(PAUSE_SECONDS)


def _rows(before: Load, during: Load, swaps: list[tuple[float, float]], promotions: int) -> Iterator[Row]:
    case = f"digits, {CLIENTS} clients"
    moments, seconds = (np.array(column) for column in zip(*during.timeline, strict=True))
    inside = np.zeros(len(moments), bool)
    for began, ended in swaps:
        inside |= (moments >= began) & (moments <= ended)
    swapping = seconds[inside]
    yield Row(case, "before", "latency p99", "ms", before.p99_seconds * 1e3)
    yield Row(case, "before", "throughput", "1/s", before.per_second)
    yield Row(case, "during a swap", "latency p99", "ms", float(np.quantile(swapping, 0.99)) * 1e3)
    yield Row(case, "during a swap", "answers", "1", float(len(swapping)))
    lasted = [ended - began for began, ended in swaps]
    yield Row(case, "during a swap", "lasts, median", "s", float(np.median(lasted)))
    yield Row(case, "during a swap", "lasts, most", "s", max(lasted))
    yield Row(case, "all of the time", "latency p99", "ms", during.p99_seconds * 1e3)
    yield Row(case, "all of the time", "throughput", "1/s", during.per_second)
    yield Row(case, "all of the time", "answers", "1", float(during.count))
    yield Row(case, "all of the time", "promotions", "1", float(len(swaps)))
    yield Row(case, "all of the time", "failed", "1", float(before.failed + during.failed))
    yield Row(case, "all of the time", "mixed", "1", float(before.mixed + during.mixed))
    wrong = before.failed + during.failed + before.mixed + during.mixed
    if wrong or len(during.versions) != 2:
        sys.exit(f"{wrong} answers failed or were mixed; {during.first_failure}; {during.versions}")
    if len(swaps) < promotions:
        sys.exit(f"{len(swaps)} of {promotions} promotions were done")


if __name__ == "__main__":
    main("serving.promotions", measure)
