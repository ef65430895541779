"""What a rank sends: counted by what it is, as a ring needs it, and as its sockets really sent it.

A ring of N ranks is optimal in bytes (Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002): of a tensor of n bytes,
each rank sends 2(N-1)/N · n to sum it everywhere, (N-1)/N · n to sum a part of it at each, and as much to gather it.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["data", "parameters", "control"]
KINDS: tuple[Kind, ...] = ("data", "parameters", "control")

_SENT_AT = 200
"""Offset of `tcpi_bytes_sent`, and behind it `tcpi_bytes_retrans`, in Linux' `struct tcp_info` (linux/tcp.h; 4.19)."""


@dataclass
class Traffic:
    """Bytes that this rank has to send, by kind."""

    ranks: int
    needed: dict[Kind, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    calls: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    def summed(self, kind: Kind, size: int) -> None:
        """A tensor of `size` bytes is summed over the ranks, and all have the sum."""
        self._count(kind, 2 * size * (self.ranks - 1) / self.ranks)

    def scattered(self, kind: Kind, size: int) -> None:
        """A tensor of `size` bytes is summed over the ranks, each of which has a part of the sum."""
        self._count(kind, size * (self.ranks - 1) / self.ranks)

    def gathered(self, kind: Kind, size: int) -> None:
        """All ranks get a tensor of `size` bytes, of which each holds a part."""
        self._count(kind, size * (self.ranks - 1) / self.ranks)

    def spread(self, kind: Kind, size: int) -> None:
        """The first rank's tensor of `size` bytes goes to all; along a chain, where each but the last sends it on."""
        self._count(kind, size * (self.ranks - 1) / self.ranks)

    def sent(self, kind: Kind, size: int) -> None:
        """`size` bytes go to one other rank."""
        self._count(kind, size)

    def _count(self, kind: Kind, size: float) -> None:
        self.needed[kind] += size
        self.calls[kind] += 1


def open_sockets() -> set[int]:
    """File descriptors of this process' sockets; empty where the system does not list them."""
    found: set[int] = set()
    if sys.platform != "linux":
        return found
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                found.add(int(name))
        except OSError:  # the folder's own descriptor, closed meanwhile
            continue
    return found


def sent_bytes(descriptors: set[int]) -> int | None:
    """Bytes that these TCP sockets have sent, repeats left out; None where the system does not say.

    Sockets of another kind, and closed ones, count nothing.
    """
    if sys.platform != "linux" or not descriptors:
        return None
    total = 0
    for descriptor in descriptors:
        try:
            with socket.socket(fileno=os.dup(descriptor)) as one:
                facts = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:
            continue
        if len(facts) < _SENT_AT + 16:
            return None
        sent, again = struct.unpack_from("=QQ", facts, _SENT_AT)
        total += sent - again
    return total
