"""Requests that are wrong, to a real server: `python -m benchmarks.serving.malformed [--quick] [--write]`.

10,000 of them, each a right request with something done to it: bytes changed, cut or doubled, other types and shapes,
wrong lengths, headers that lie, paths that lead nowhere, and what is no HTTP at all. Counted is what came back. The run
fails on an answer of 5xx, on a server that died, and if it does not answer a right request at the end.
"""

from __future__ import annotations

import json
import random
import select
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks._report import Row, main
from benchmarks.serving import load
from benchmarks.serving.load import Job
from benchmarks.serving.models import Model, digits, publish_model, server
from modelpress.store import open_store

PATH = "/v2/models/digits/infer"
WAIT_SECONDS = 20.0
PATIENCE_SECONDS = 1.0
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    2**63,
    1e400,
    "",
    "x",
    [],
    [[]],
    {},
    {"a": 1},
    "\ud800".encode("utf-8", "replace").decode(),
]


def measure(quick: bool) -> Iterator[Row]:
    """What came back, by kind of fault."""
    requests, rng = 500 if quick else 10_000, random.Random(0)
    model, found, server_errors = digits(), dict[str, Counter[str]](), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(f"{folder}/store")
        publish_model(store, Path(folder, "shards"), model)
        with server(store, {"MODELPRESS_SERVING_THREADS": 1}) as running:
            job = Job(running.host, running.port, PATH, model.request, 4, 3600.0, 200)
            load.run(job)
            process = psutil.Process(running.process.pid)
            before = process.memory_info().rss
            for _ in range(requests):
                kind = rng.choice(list(FAULTS))
                data = FAULTS[kind](model, rng)
                answer = _send(running.host, running.port, data)
                found.setdefault(kind, Counter())[answer[:1] + "xx" if answer.isdigit() else answer] += 1
                if answer.startswith("5"):
                    server_errors.append(f"{kind}: {answer} to {data[:300]!r}")
            after, alive = process.memory_info().rss, running.process.poll() is None
            last = load.run(job)
    for kind, counts in sorted(found.items()):
        for status in ("2xx", "4xx", "5xx", "closed"):
            yield Row("digits", kind, status, "1", float(counts[status]))
    every = sum(sum(counts.values()) for counts in found.values())
    yield Row("digits", "all", "sent", "1", float(every))
    yield Row("digits", "all", "5xx", "1", float(len(server_errors)))
    yield Row("digits", "all", "memory, after to before", "1", after / before)
    if server_errors or not alive or last.failed:
        sys.exit(f"alive: {alive}; failed afterwards: {last.failed}; 5xx: {server_errors[:5]}")


def _send(host: str, port: int, data: bytes) -> str:
    """The status of the answer; `closed` where the connection ended without one."""
    with socket.create_connection((host, port), timeout=WAIT_SECONDS) as line:
        try:
            line.sendall(data)
            if not select.select([line], [], [], PATIENCE_SECONDS)[0]:
                line.shutdown(socket.SHUT_WR)  # it may wait for more than was sent
            answer = line.recv(4096)
        except (ConnectionError, TimeoutError):
            return "closed"
    return answer[9:12].decode("latin-1") if answer.startswith(b"HTTP/1.") else "closed"


def _http(body: bytes, path: str = PATH, method: str = "POST", **headers: str) -> bytes:
    lines = {"Host": "x", "Content-Length": str(len(body)), "Connection": "close"}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return head.encode("latin-1", "replace") + b"\r\n" + body


def _bytes(model: Model, rng: random.Random) -> bytes:
    body = bytearray(model.request.encode("latin-1"))
    for _ in range(rng.randint(1, 8)):
        body[rng.randrange(len(body))] = rng.randrange(256)
    return _http(bytes(body))


def _cut(model: Model, rng: random.Random) -> bytes:
    body = model.request.encode("latin-1")
    return _http(body[: rng.randrange(len(body))])


def _types(model: Model, rng: random.Random) -> bytes:
    """One field of the JSON, at any depth, becomes something else."""
    document = json.loads(model.request)
    holder: Any = document
    while True:
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        if isinstance(holder[key], (dict, list)) and holder[key] and rng.random() < 0.7:
            holder = holder[key]
            continue
        holder[key] = rng.choice(VALUES)
        return _http(json.dumps(document).encode())


def _binary(model: Model, rng: random.Random) -> bytes:
    text, header = model.binary()
    body = bytearray(text.encode("latin-1"))
    choice = rng.randrange(4)
    if choice == 0:
        del body[rng.randrange(len(body)) :]
    elif choice == 1:
        body += rng.randbytes(rng.randrange(1, 50))
    elif choice == 2:
        body[rng.randrange(header)] = rng.randrange(256)
    else:
        header += rng.choice([-1, 1, 10, 10**6])
    return _http(bytes(body), Inference_Header_Content_Length=str(header))


def _headers(model: Model, rng: random.Random) -> bytes:
    body = model.request.encode("latin-1")
    lies: list[dict[str, str]] = [
        {"Content_Length": str(rng.choice([0, 1, len(body) - 1, len(body) + 10, 10**9, 10**30]))},
        {"Content_Length": rng.choice(["-1", "x", "1,2", ""])},
        {"Inference_Header_Content_Length": rng.choice(["-1", "x", "9" * 40, "0", "1.5"])},
        {"X_Request_Timeout": rng.choice(["-1", "x", "9" * 40, "1.5"])},
        {"Content_Encoding": rng.choice(["gzip", "br", "x" * 5000])},
        {"Transfer_Encoding": rng.choice(["chunked", "x"])},
        {"Authorization": rng.choice(["Bearer", "x", "Bearer " + "y" * 5000])},
        {"Modelpress_Canary_Key": rng.choice(["", "é" * 100, "z" * 5000])},
    ]
    return _http(body, **rng.choice(lies))


def _paths(model: Model, rng: random.Random) -> bytes:
    parts = [
        "v2",
        "models",
        "digits",
        "versions",
        "infer",
        "..",
        "%2e%2e",
        "%00",
        "%ff",
        "x" * 3000,
        "",
        "ready",
        "load",
    ]
    path = "/" + "/".join(rng.choice(parts) for _ in range(rng.randint(0, 7)))
    method = rng.choice(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE"])
    return _http(model.request.encode("latin-1") if method == "POST" else b"", path, method)


def _repository(_model: Model, rng: random.Random) -> bytes:
    body = rng.choice([b"[]", b"{", b'{"ready": 1}', b'{"parameters": {"config": "{}"}}', rng.randbytes(40), b"null"])
    return _http(body, rng.choice(["/v2/repository/index", "/v2/repository/models/digits/load"]))


def _noise(_model: Model, rng: random.Random) -> bytes:
    return rng.choice([rng.randbytes(rng.randint(1, 2000)), b"GET\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n", b"\r\n" * 50])


FAULTS: dict[str, Callable[[Model, random.Random], bytes]] = {
    "bytes changed": _bytes,
    "cut": _cut,
    "other values": _types,
    "binary data": _binary,
    "headers": _headers,
    "paths": _paths,
    "repository": _repository,
    "no HTTP": _noise,
}

if __name__ == "__main__":
    main("serving.malformed", measure)
