"""Ranks that torchrun starts, forked from a process that has imported everything once.

torchrun starts ranks as `$PYTHON_EXEC -u -m modelpress.parallel.rank FOLDER`. Here that is a program of a few lines: it
asks for a fork, and ends as the fork does, by its status or by its signal. Who kills it kills the fork. All else is
real: the agent, what it gives each rank to know, deaths and restarts. That ranks start from nothing is tested where
that is the point (`e2e` in `test_launch.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parallel.forks import server

PROGRAM = """#!{python} -SE
import json, os, signal, socket, sys
asked = json.dumps({{"arguments": sys.argv, "environment": dict(os.environ), "folder": os.getcwd()}}).encode()
with socket.socket(socket.AF_UNIX) as warm:
    warm.connect({place!r})
    socket.send_fds(warm, [len(asked).to_bytes(8, "big")], [0, 1, 2])
    warm.sendall(asked)
    status = int(warm.recv(16) or -signal.SIGKILL)
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


@contextlib.contextmanager
def warm_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within this block, torchrun's ranks are forks."""
    place, program = str(folder / "warm"), folder / "python"
    program.write_text(PROGRAM.format(python=sys.executable, place=place))
    program.chmod(0o700)
    monkeypatch.setenv("PYTHON_EXEC", str(program))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(place)
        listening.listen()
        forking = server().Process(target=_serve, args=(listening,))
        forking.start()
    try:
        yield
    finally:
        forking.kill()
        forking.join()


def _serve(listening: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that watch
    while True:
        asking, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            _watch(asking)
        asking.close()


def _watch(asking: socket.socket) -> None:
    """Fork a rank, and be between it and who asked for it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, files, _, _ = socket.recv_fds(asking, 8, 3)
    asked = json.loads(asking.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL))
    rank = os.fork()
    if rank == 0:
        asking.close()
        _be(asked["arguments"], asked["environment"], asked["folder"], files)
    ended = os.pidfd_open(rank)
    ready, _, _ = select.select([asking, ended], [], [])
    if asking in ready:  # it was killed
        os.kill(rank, signal.SIGKILL)
    _, status = os.waitpid(rank, 0)
    with contextlib.suppress(OSError):
        asking.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _be(arguments: list[str], environment: dict[str, str], folder: str, files: list[int]) -> None:
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    module = arguments.index("-m") + 1
    sys.argv = arguments[module:]
    status = 1
    try:
        runpy.run_module(arguments[module], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001  as the interpreter does
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
