"""Start, find and end processes of a stack.

A process is known by the mark in its environment, never by its number alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

MARK = "MODELPRESS_STACK_PART"
"""`<identity>/<part>` in the environment of each process of a stack."""
PR_SET_PDEATHSIG = 1
ROUNDS = 5

_Gone = (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess, OSError)


def spawn(command: Sequence[str], environment: Mapping[str, str], log: Path, cwd: Path) -> subprocess.Popen[bytes]:
    """Start a program as the leader of a session, with its output at the end of `log`.

    Its standard input is a pipe that closes when the caller ends; on Linux it is sent SIGTERM then, too.

    Raises:
        OSError: the program is not there, or the log can't be written.
    """
    with open(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600), "wb") as output:
        return subprocess.Popen(
            command,
            env=environment,
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent(),  # the supervisor has one thread
        )


def _end_with_parent() -> Callable[[], None] | None:
    if sys.platform != "linux":
        return None
    parent, control = os.getpid(), ctypes.CDLL(None, use_errno=True).prctl

    def ask() -> None:
        control(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it ended before it was asked for
            os.kill(os.getpid(), signal.SIGTERM)

    return ask


def marked(mark: str) -> list[psutil.Process]:
    """Processes of this user whose mark is this one, or begins with it if it ends with a slash; without the caller."""
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            theirs = process.environ().get(MARK, "")
            if theirs == mark or (mark.endswith("/") and theirs.startswith(mark)):
                found.append(process)
        except _Gone:
            continue
    return found


def end(processes: Sequence[psutil.Process], seconds: float) -> None:
    """SIGTERM, and SIGKILL for what is still there after that time; returns when all have ended."""
    for process in processes:
        _send(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    for process in alive:
        _send(process, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=seconds)


def end_all(mark: str, seconds: float) -> int:
    """End everything that carries the mark, also what is started meanwhile; the number of processes.

    What not even SIGKILL ends (it waits for a disk that does not answer) is left after a few rounds.
    """
    seen: set[psutil.Process] = set()
    for _ in range(ROUNDS):
        found = marked(mark)
        if not found:
            break
        seen.update(found)
        end(found, seconds)
    return len(seen)


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(*_Gone):
        process.send_signal(number)  # psutil looks whether the number is still this process's
