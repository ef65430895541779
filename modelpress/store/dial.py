"""Connections to a host by its name, within one limit on time for the name and all its addresses."""

from __future__ import annotations

import queue
import socket
import threading
import time
from typing import Any


def dial(host: str, port: int, seconds: float) -> socket.socket:
    """A connection to the first of a name's addresses that answers; finding them counts into the time, and the socket
    may wait for what is left of it.

    Each address gets an equal share of the time that is left, so that a dead one leaves time for the next.

    Raises:
        OSError: none of them, or no such name; TimeoutError, not in time.
    """
    end = time.monotonic() + seconds
    addresses = _addresses(host, port, seconds)
    for left in range(len(addresses), 0, -1):
        family, kind, protocol, _, where = addresses[-left]
        plain = socket.socket(family, kind, protocol)
        try:
            plain.settimeout(max(0.001, (end - time.monotonic()) / left))
            plain.connect(where)
            plain.settimeout(max(0.001, end - time.monotonic()))
            return plain
        except BaseException as error:
            plain.close()
            if left == 1 or not isinstance(error, OSError):
                raise
    raise OSError(f"{host} has no address")


def _addresses(host: str, port: int, seconds: float) -> list[Any]:
    """What `socket.getaddrinfo` says, in time: it has no limit of its own, so a thread asks, which nobody waits for."""
    answer: queue.SimpleQueue[list[Any] | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answer.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answer.put(error if isinstance(error, OSError) else OSError(f"{host!r} is no name of a host"))

    threading.Thread(target=ask, name="resolve", daemon=True).start()
    try:
        found = answer.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no address of {host} within {seconds:.3g} s") from None
    if isinstance(found, OSError):
        raise found
    return found
