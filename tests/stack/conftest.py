"""Supervisors over small real programs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from modelpress.stack import processes
from modelpress.stack.layout import Chosen, Folder, State, write
from tests.conftest import ROOT

DEADLINE_SECONDS = 60.0
QUICK = {"turn_seconds": 0.02, "look_seconds": 0.1, "first_wait_seconds": 0.05, "most_wait_seconds": 0.2}

SERVER = """
import http.server, pathlib, signal, sys
port, name, notes = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
def say(what):
    with notes.open("a") as file:
        file.write(f"{what} {name}\\n")
def stop(*_):
    say("stop")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if (notes.parent / f"{name}.sick").exists() else 200)
        self.end_headers()
    def log_message(self, *_):
        pass
server = http.server.HTTPServer(("127.0.0.1", port), Answer)
say("start")
server.serve_forever()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Bench:
    """A stack's folder, its supervisor, and what its programs wrote down."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, Folder(path / "stack")
        self.folder.make()
        self.identity = Chosen().identity
        write(self.folder.chosen, Chosen(identity=self.identity).model_dump_json())
        self.notes = path / "notes"
        self.process: subprocess.Popen[bytes] | None = None

    def program(self, name: str, code: str, *arguments: str, **part: Any) -> dict[str, Any]:
        return {
            "name": name,
            "command": [sys.executable, "-c", code, *arguments],
            "environment": dict(os.environ),
        } | part

    def server(self, name: str, **part: Any) -> dict[str, Any]:
        port = free_port()
        health = f"http://127.0.0.1:{port}/"
        return self.program(name, SERVER, str(port), name, str(self.notes), **({"health": health} | part))

    def start(self, *parts: dict[str, Any], **policy: float) -> None:
        spec = self.path / "parts.json"
        spec.write_text(json.dumps({"parts": parts, "policy": QUICK | policy}))
        environment = {**os.environ, processes.MARK: f"{self.identity}/supervisor", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.stack.driver", str(self.folder.path), str(spec)]
        with self.folder.log("supervisor").open("wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def wait(self, condition: Callable[[State], bool]) -> State:
        end = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < end:
            state = self.folder.read_state()
            if state is not None and condition(state):
                return state
            time.sleep(0.02)
        pytest.fail(f"{state!r}\n{self.said}")

    def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(DEADLINE_SECONDS)

    def left(self) -> list[psutil.Process]:
        return processes.marked(f"{self.identity}/")

    def noted(self) -> list[str]:
        return self.notes.read_text().splitlines() if self.notes.exists() else []

    @property
    def said(self) -> str:
        return self.folder.log("supervisor").read_text()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    try:
        yield bench
    finally:
        if bench.process is not None and bench.process.poll() is None:
            bench.process.send_signal(signal.SIGKILL)
            bench.process.wait()
        processes.end_all(f"{bench.identity}/", 1.0)
