"""Real server processes: swaps under load, a graceful end, and what keeps one from starting."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import torch

from modelpress import keys, load, pointer
from modelpress.access import add_key, revoke_keys
from modelpress.store import Store
from serving.protocol import decode_response, encode_request
from tests import warm
from tests.conftest import OpenS3, S3Server
from tests.serving.conftest import CLASSES, WIDTH, Server, publish_pack, scale_model

Call = Callable[..., Any]

INFER = "/v2/models/scale/infer"
CLIENTS, PROMOTIONS, BATCH = 4, 8, 32
DEADLINE_SECONDS = 30.0
END_SECONDS = 10.0
"""From SIGTERM to the end with a drain of 1 s; a request to the store may take 5 attempts of 30 s each."""


class Client(threading.Thread):
    """Asks without pause, and checks that each answer is whole and of the pack that it names."""

    def __init__(self, url: str, values: dict[str, float]) -> None:
        super().__init__()
        self.url, self.values = url, values
        self.stopped = threading.Event()
        self.failures: list[str] = []
        self.versions: set[str] = set()

    def run(self) -> None:
        body = encode_request({"x": np.ones((BATCH, WIDTH), np.float32)})
        with httpx.Client(base_url=self.url, timeout=30) as client:
            while not self.stopped.is_set():
                try:
                    self.check(client.post(INFER, content=body))
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))

    def check(self, answer: httpx.Response) -> None:
        if answer.status_code != 200:
            self.failures.append(answer.text)
            return
        version = answer.json()["model_version"]
        found = decode_response(answer.content)["y"]
        if not np.array_equal(found, np.full((BATCH, CLASSES), WIDTH * self.values[version], np.float32)):
            self.failures.append(f"{version} answered {np.unique(found)}")
        self.versions.add(version)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def version(server: Server) -> str:
    found: str = server.client.get("/v2/models/scale").json()["versions"][0]
    return found


def test_promotions_under_load_drop_and_mix_nothing(store: Store, press: Call, serve: Call) -> None:
    values = {press(scale_model(value), alias=None): value for value in (2.0, 3.0)}
    order = itertools.cycle(values)
    pointer.append(store, "scale", "champion", next(order), "promote")
    server: Server = serve("scale")
    clients = [Client(server.url, values) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    for _ in range(PROMOTIONS):
        pack = next(order)
        pointer.append(store, "scale", "champion", pack, "promote")
        wait_for(lambda pack=pack: version(server) == pack)
    for client in clients:
        client.stopped.set()
    for client in clients:
        client.join()
    assert [failure for client in clients for failure in client.failures] == []
    assert all(client.versions == set(values) for client in clients)
    assert server.stop() == 0


def test_a_corrupt_promotion_leaves_the_old_pack_serving(store: Store, press: Call, serve: Call) -> None:
    first = press(scale_model(2.0))
    server: Server = serve()
    second = press(scale_model(3.0), alias=None)
    key = keys.blob(load.load_manifest(store, "scale", second).shards[0].sha256)
    store.put(key, store.get(key)[:-1] + b"\xff")
    pointer.append(store, "scale", "champion", second, "promote")
    wait_for(lambda: "failure" in server.client.get("/v2/models/scale").json()["parameters"])
    answer = server.client.post(INFER, content=encode_request({"x": np.ones((1, WIDTH), np.float32)}))
    assert answer.json()["model_version"] == first
    (row,) = server.client.post("/v2/repository/index").json()
    assert (row["state"], row["version"]) == ("READY", first)
    assert "not what the manifest says" in row["reason"]
    refused = server.client.post("/v2/repository/models/scale/load")
    assert refused.status_code == 503
    assert "CorruptionError" in refused.json()["error"]
    assert server.client.get("/v2/health/ready").status_code == 200
    assert server.stop() == 0
    log = "".join(server.lines)
    assert "goes on answering" in log
    assert "sha256" in log  # the operator sees what the client does not


def test_sigterm_answers_what_runs(press: Call, serve: Call) -> None:
    press(scale_model(2.0))
    server: Server = serve("scale")
    body = encode_request({"x": np.ones((1, WIDTH), np.float32)})
    connection = HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    connection.putrequest("POST", INFER)
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders()
    connection.send(body[:10])
    server.client.get("/v2/health/live")  # by its answer the half request was read as well
    server.process.send_signal(signal.SIGTERM)
    host, port = connection.host, connection.port
    wait_for(lambda: not listens(host, port))
    connection.send(body[10:])
    answer: HTTPResponse = connection.getresponse()
    assert answer.status == 200
    assert decode_response(answer.read())["y"][0, 0] == 2 * WIDTH
    connection.close()
    assert server.process.wait(30) == 0


def test_sigterm_answers_all_of_many_that_run(press: Call, serve: Call) -> None:
    """Requests that have begun, most of them with a body that still comes: each is answered, and no new one let in."""
    press(scale_model(2.0))
    server: Server = serve("scale", MODELPRESS_SERVING_WORKERS="2", MODELPRESS_SERVING_MAX_QUEUE="64")
    bodies = [encode_request({"x": np.full((1, WIDTH), number, np.float32)}) for number in range(16)]
    lines = [HTTPConnection(server.url.removeprefix("http://"), timeout=30) for _ in bodies]
    for number, (line, body) in enumerate(zip(lines, bodies, strict=True)):
        line.putrequest("POST", INFER)
        line.putheader("Content-Length", str(len(body)))
        line.endheaders()
        line.send(body[: number * len(body) // 16])
    server.client.get("/v2/health/live")  # by its answer the others were read as well
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: not listens(lines[0].host, lines[0].port))
    for number, (line, body) in enumerate(zip(lines, bodies, strict=True)):
        line.send(body[number * len(body) // 16 :])
    answers = [line.getresponse() for line in lines]
    assert [answer.status for answer in answers] == [200] * len(lines)
    found = [decode_response(answer.read())["y"][0, 0] for answer in answers]
    assert found == [2.0 * WIDTH * number for number in range(16)]
    assert server.process.wait(30) == 0


def test_a_key_that_is_revoked_is_refused_by_a_server_that_runs(press: Call, serve: Call, tmp_path: Path) -> None:
    press(scale_model(2.0))
    path = tmp_path / "keys.json"
    first = add_key(path, "team", ["infer"], None)
    server: Server = serve("scale", "--host", "0.0.0.0", MODELPRESS_SERVING_KEYS_FILE=str(path))
    url = f"http://127.0.0.1:{server.url.rpartition(':')[2]}/v2/models/scale"

    def status(key: str) -> int:
        return httpx.get(url, headers={"Authorization": f"Bearer {key}"}, timeout=30).status_code

    assert status(first) == 200
    second = add_key(path, "team", ["infer"], None)
    wait_for(lambda: status(second) == 200)
    revoke_keys(path, first.split("_")[1])
    wait_for(lambda: status(first) == 401)
    assert status(second) == 200


class Gateway:
    """Passes bytes to a real S3 server, until it falls silent: then it takes all and answers nothing."""

    def __init__(self, endpoint: str) -> None:
        self.silent = threading.Event()
        target = urlsplit(endpoint)
        gateway = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with socket.create_connection((target.hostname or "", target.port or 80)) as upstream:
                    back = threading.Thread(target=gateway.pump, args=(upstream, self.request), daemon=True)
                    back.start()
                    gateway.pump(self.request, upstream)

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not self.silent.is_set():
                    target.sendall(data)

    def close(self) -> None:
        self.server.shutdown()
        self.server.socket.close()


@pytest.mark.s3
def test_a_silent_store_does_not_hold_up_the_end(
    open_s3: OpenS3, s3_server: S3Server, serve: Call, tmp_path: Path
) -> None:
    store = open_s3("writer")
    publish_pack(store, tmp_path, scale_model(2.0), "scale")
    with contextlib.closing(Gateway(s3_server.endpoint)) as gateway:
        environment = s3_server.environment() | {
            "MODELPRESS_STORE": store.uri,
            "MODELPRESS_S3_ENDPOINT_URL": gateway.endpoint,
            "MODELPRESS_SERVING_DRAIN_SECONDS": "1",
        }
        server: Server = serve("scale", **environment)
        gateway.silent.set()
        host, port = server.url.removeprefix("http://").split(":")
        load_request = HTTPConnection(host, int(port), timeout=30)
        load_request.request("POST", "/v2/repository/models/scale/load")
        time.sleep(0.5)  # the poller and the load wait for the store now
        answer = server.client.post(INFER, content=encode_request({"x": np.ones((1, WIDTH), np.float32)}))
        assert answer.status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(END_SECONDS) == 0
        load_request.close()


def listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def test_a_body_over_the_cap_is_refused_on_the_wire(press: Call, serve: Call) -> None:
    press(scale_model(2.0))
    server: Server = serve(MODELPRESS_SERVING_MAX_BODY_BYTES="1000")
    answer = server.client.post(INFER, content=b" " * 100_000)
    assert answer.status_code == 413
    assert "1000" in answer.json()["error"]
    assert server.client.get("/v2/health/live").status_code == 200


def test_a_full_server_refuses_a_large_body_on_the_wire(press: Call, serve: Call) -> None:
    press(scale_model(2.0))
    server: Server = serve(MODELPRESS_SERVING_WORKERS="1", MODELPRESS_SERVING_MAX_QUEUE="0")
    body = encode_request({"x": np.ones((1, WIDTH), np.float32)})
    held = HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    held.putrequest("POST", INFER)
    held.putheader("Content-Length", str(len(body)))
    held.endheaders()
    held.send(body[:10])
    server.client.get("/v2/health/live")  # by its answer the half request was read as well
    answer = server.client.post(INFER, content=b" " * 1_000_000)
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
    held.send(body[10:])
    assert held.getresponse().status == 200
    held.close()
    assert server.client.post(INFER, content=body).status_code == 200


def failing(store: Store, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"MODELPRESS_STORE": store.uri} | environment
    return warm.servers().run("serve", *arguments, env=env)


def test_a_port_in_use_is_said(store: Store, press: Call) -> None:
    press(scale_model(2.0))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = failing(store, "scale", "--port", str(port))
    assert done.returncode == 3
    assert f"listening on 127.0.0.1:{port}" in done.stderr
    assert "--port" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_second_server_on_the_port_leaves_the_first_alone(store: Store, press: Call, serve: Call) -> None:
    press(scale_model(2.0))
    server: Server = serve("scale")
    done = failing(store, "scale", "--port", server.url.rpartition(":")[2])
    assert done.returncode == 3
    assert server.client.get("/v2/health/ready").status_code == 200


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
def test_a_missing_provider_is_refused_even_without_a_model(store: Store, provider: str) -> None:
    done = failing(store, "--port", "0", "--provider", provider)
    assert done.returncode == 3
    assert f"expected: {provider} in use" in done.stderr
    assert "CPUExecutionProvider" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "said"),
    [
        (["nobody"], {}, 8, "nobody@champion"),
        (["Nobody"], {}, 2, "a pack name"),
        (["--provider", "GpuPlease"], {}, 2, "MODELPRESS_SERVING_PROVIDER"),
        ([], {"MODELPRESS_SERVING_WORKERS": "many"}, 2, "MODELPRESS_SERVING_WORKERS"),
        (["--host", "no.such.host.invalid"], {}, 3, "no.such.host.invalid"),
        (["--host", "203.0.113.1", "--open"], {}, 3, "203.0.113.1"),
        (["--host", "203.0.113.1"], {}, 2, "modelpress access create"),
        (["--host", "0.0.0.0"], {}, 2, "everybody who reaches it"),
        (["--host", "::"], {}, 2, "everybody who reaches it"),
        (["--keys-file", "/nowhere/keys.json"], {}, 2, "/nowhere/keys.json"),
        ([], {"MODELPRESS_SERVING_JWT_ISSUER": "https://i"}, 2, "MODELPRESS_SERVING_JWT_KEYS_FILE"),
        ([], {"MODELPRESS_SERVING_TLS_CERT_FILE": "/nowhere"}, 2, "MODELPRESS_SERVING_TLS_KEY_FILE"),
        (["--open", "--keys-file", "/nowhere"], {}, 2, "keys, or everybody"),
        ([], {"MODELPRESS_SERVING_AUDIT_FILE": "/nowhere/audit"}, 2, "MODELPRESS_SERVING_AUDIT_FILE"),
    ],
    ids=str,
)
def test_what_keeps_it_from_starting_is_said(
    store: Store, arguments: list[str], environment: dict[str, str], code: int, said: str
) -> None:
    done = failing(store, "--port", "0", *arguments, **environment)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_module_is_the_same_server(store: Store, press: Call, tmp_path: Path) -> None:
    """`python -m serving`, all by environment."""
    environment = {"MODELPRESS_STORE": store.uri, "MODELPRESS_SERVING_MODELS": "nobody", "MODELPRESS_SERVING_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "serving"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 8
    assert "nobody@champion" in done.stderr


def test_the_module_names_a_bad_variable() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "serving"],
        env=os.environ | {"MODELPRESS_S3_ATTEMPTS": "many"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "MODELPRESS_S3_ATTEMPTS='many'" in done.stderr
    assert "Traceback" not in done.stderr
