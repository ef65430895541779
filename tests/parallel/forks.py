"""Ranks for tests: processes forked from a server that has imported everything once."""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

SECONDS = 240.0
"""Until ranks count as stuck; on a machine with other work each may be slow."""


@functools.cache
def server() -> Any:
    """One for all tests here: Python has a single server for a process, and takes up what the first user preloads."""
    context = multiprocessing.get_context("forkserver")
    lazily = ["modelpress.codec.kernels", "modelpress.prune", "modelpress.checkpoint"]
    context.set_forkserver_preload(["tests.parallel.cases", "tests.parallel.work", *lazily])
    return context


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    names = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in names.items()}


def _be(pipe: Connection, who: dict[str, str], work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        pipe.send((work(who, *arguments), None))
    except BaseException as error:  # noqa: BLE001  the parent raises it
        pipe.send((None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
        pipe.close()
        os._exit(1)  # sockets close, as those of a rank that died


def together(size: int, work: Callable[..., Any], *arguments: Any) -> list[tuple[Any, str | None]]:
    """What `work(environment, *arguments)` gave at each rank, or the text of its error."""
    port, running = free_port(), []
    for rank in range(size):
        ours, theirs = server().Pipe(duplex=False)
        process = server().Process(target=_be, args=(theirs, environment(rank, size, port), work, arguments))
        process.start()
        theirs.close()
        running.append((process, ours))
    found: list[tuple[Any, str | None]] = []
    for process, pipe in running:
        said: tuple[Any, str | None] | None = (None, "stuck")
        try:
            said = pipe.recv() if pipe.poll(SECONDS) else said
        except EOFError:
            said = None
        process.join(10)
        if process.is_alive():
            process.kill()
        found.append(said or (None, f"ended with {process.exitcode}"))
    return found


def results(found: list[tuple[Any, str | None]]) -> list[Any]:
    for _, error in found:
        assert error is None, error
    return [value for value, _ in found]
