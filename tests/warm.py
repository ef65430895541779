"""Processes of the command line that need not import everything anew: each is forked from one that has.

`modelpress` and `prefect` take seconds of a core before their first own line, nearly all of it for importing torch,
Prefect and MLflow, and tests start a hundred such processes. In all else each is what it would be: a process with an
environment, a folder, signals, output and an exit code of its own. That the command starts from nothing is tested
where that is the point (`tests/cli/test_cli.py`, `tests/docs/test_docs.py`, `python -m serving` in
`tests/serving/test_process.py`); Prefect's workers start each run from nothing.

`python -m tests.warm SOCKET MODULE...` is the process that imports and forks.
"""

from __future__ import annotations

import functools
import gc
import importlib
import io
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).parents[1]
# ONNX Runtime starts a thread when it is imported, which forks would lack: not in these.
SERVING = (
    *("torch", "onnx", "boto3", "prometheus_client", "uvicorn.protocols.http.httptools_impl", "starlette.applications"),
    *("modelpress.cli", "modelpress.doctor", "modelpress.codec.kernels", "modelpress.container", "modelpress.process"),
    *("serving.access_settings", "serving.audit", "serving.batching", "serving.protocol", "serving.tracing"),
)
FLOWS = (
    *(*SERVING, "flows.optimize", "flows.promote", "modelpress.workload", "modelpress.train"),
    *("prefect.cli.deploy", "prefect.cli.work_pool", "prefect.cli.worker", "prefect.workers.process"),
)
MODELPRESS, PREFECT = "modelpress.cli:main", "prefect.cli:app"
HEAD = struct.Struct("!Q")


class Process:
    """One that runs, with as much of `subprocess.Popen` as tests use; its output is text."""

    def __init__(self, arguments: Sequence[str], status: int, stdout: int, stderr: int) -> None:
        self.args = list(arguments)
        self.stdout = io.TextIOWrapper(io.FileIO(stdout), encoding="utf-8")
        self.stderr = io.TextIOWrapper(io.FileIO(stderr), encoding="utf-8")
        self._status = io.FileIO(status)
        self.pid = int(self._line())
        self.returncode: int | None = None

    def _line(self) -> str:
        line = b""
        while not line.endswith(b"\n"):
            read = self._status.read(1)
            if not read:
                raise RuntimeError(f"{self.args!r} was not started, or nobody waited for it")
            line += read
        return line.decode()

    def poll(self) -> int | None:
        """Its exit code once it has ended; less than 0: the signal that ended it."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = int(self._line())
            self._status.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code.

        Raises:
            subprocess.TimeoutExpired: it runs after `timeout` seconds.
        """
        if self.returncode is None and not select.select([self._status], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        code = self.poll()
        assert code is not None
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that it writes until it ends.

        Raises:
            subprocess.TimeoutExpired: it runs after `timeout` seconds.
        """
        written = ["", ""]

        def read(number: int, stream: io.TextIOWrapper) -> None:
            with stream:
                written[number] = stream.read()

        readers = [
            threading.Thread(target=read, args=given, daemon=True) for given in enumerate((self.stdout, self.stderr))
        ]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        return written[0], written[1]

    def send_signal(self, number: int) -> None:
        """To it, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Warm:
    """The process that has imported.

    Args:
        modules: what it imports.
        environment: with which.
    """

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        self._socket, other = socket.socketpair()
        self._lock = threading.Lock()
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.warm", str(other.fileno()), *modules],
                cwd=ROOT,
                env={**environment, "PYTHONPATH": str(ROOT)},
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
            )

    def close(self) -> None:
        """End it; what it forked goes on."""
        self._socket.close()
        self._process.wait()

    def start(
        self,
        *arguments: str,
        env: Mapping[str, str],
        cwd: Path | None = None,
        program: str = MODELPRESS,
        output: BinaryIO | None = None,
    ) -> Process:
        """Start `program` with these arguments, and with this environment alone; `output` takes all that it writes."""
        pipes = [os.pipe() for _ in range(3)]
        given = [pipes[0][1], *([write for _, write in pipes[1:]] if output is None else [output.fileno()] * 2)]
        request = {"arguments": arguments, "environment": dict(env), "folder": str(cwd or Path.cwd())}
        request["program"] = program
        data = json.dumps(request).encode()
        with self._lock:
            socket.send_fds(self._socket, [HEAD.pack(len(data))], given)
            self._socket.sendall(data)
        for _, write in pipes:
            os.close(write)
        return Process([program, *arguments], *(read for read, _ in pipes))

    def run(
        self,
        *arguments: str,
        env: Mapping[str, str],
        cwd: Path | None = None,
        program: str = MODELPRESS,
        timeout: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Run `program` to its end.

        Raises:
            subprocess.TimeoutExpired: it ran longer, and was killed.
        """
        process = self.start(*arguments, env=env, cwd=cwd, program=program)
        try:
            out, err = process.communicate(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.wait(), out, err)


@functools.cache
def servers() -> Warm:
    """For `modelpress serve`, until this process ends."""
    return Warm(SERVING, os.environ)


@functools.cache
def flows() -> Warm:
    """For commands that run flows, and for Prefect's own, until this process ends."""
    # The first test that asks may have settings and secrets of its own.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MODELPRESS_", "AWS_"))}
    return Warm(FLOWS, clean)


def _fork(control: socket.socket) -> tuple[str, list[str]]:
    """Fork as asked until nobody asks any more; returns in the children alone: which program, and its arguments."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a person, who means the tests
    while True:
        head, descriptors, _, _ = socket.recv_fds(control, HEAD.size, 3)
        if not head:
            sys.exit(0)
        (length,) = HEAD.unpack(head)
        data = b""
        while len(data) < length:
            data += control.recv(length - len(data))
        if os.fork() == 0:
            control.close()
            return _watched(json.loads(data), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        while _reaped():
            pass


def _reaped() -> bool:
    """Whether one of those who watched has ended, and was waited for."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def _watched(request: dict[str, Any], status: int, stdout: int, stderr: int) -> tuple[str, list[str]]:
    """Fork once more; the parent says the child's number and its exit code to `status`, and ends."""
    child = os.fork()
    if child:
        os.close(stdout)
        os.close(stderr)
        os.write(status, b"%d\n" % child)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        try:
            os.write(status, b"%d\n" % code)
        finally:
            os._exit(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    for descriptor in (status, stdout, stderr):
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    return request["program"], request["arguments"]


def _main() -> None:
    for module in sys.argv[2:]:
        importlib.import_module(module)
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    # An allocator's own, pyarrow's, which makes it anew.
    others = [name for name in threads if name != "jemalloc_bg_thd"][1:]
    assert not others, f"a fork would lack the threads that imports have started: {others}"
    gc.collect()
    gc.freeze()  # pages that no collection writes to stay shared
    with socket.socket(fileno=int(sys.argv[1])) as control:
        program, arguments = _fork(control)
    if "prefect" in sys.modules:
        sys.modules["prefect.context"].refresh_global_settings_context()  # it read the environment when it was imported
        sys.modules["prefect.logging.configuration"].setup_logging()
    module, _, name = program.partition(":")
    sys.argv = [module.partition(".")[0], *arguments]
    getattr(importlib.import_module(module), name)()


if __name__ == "__main__":
    _main()
