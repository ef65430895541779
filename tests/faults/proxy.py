"""A proxy between a store and the real S3 server that breaks what it is told to break.

It reads one request at a time from each connection, takes the first injected fault that fits it, and passes the
request and its answer on, or does not. It knows just enough of HTTP to tell requests apart; the server behind it is a
real one, and checks signatures, digests and conditions as ever. It keeps a log of what passed, so that tests can count
the bytes that were sent.
"""

from __future__ import annotations

import http.client
import io
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

FOREVER = 10**9
BLOCK = 2**16
ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"

KINDS = {
    "cut_request": "`after` bytes of the body reach the server, then both sides are closed",
    "reset_request": "as `cut_request`, and the client gets a reset",
    "stall_request": "nothing is read any more after `after` bytes of the body, and nothing is said",
    "half_open": "the request is not even read: a connection whose other end is gone",
    "slow_request": "the body is read at `rate` bytes per second",
    "flip_request": "one byte of the body is changed on the way",
    "slow_down": "the server never sees the request; 503 SlowDown is answered",
    "error_500": "the server never sees the request; 500 InternalError is answered",
    "garbage": "the server never sees the request; noise is answered",
    "delay": "the answer comes `seconds` late",
    "lost": "the server does what was asked, and its answer never arrives",
    "twice": "the server gets the request twice; its second answer arrives",
    "late": "the client gets a reset at once, and the server the request when `let_late_ones_go` is called",
    "cut_answer": "`after` bytes of the answer's body arrive, then the connection is closed",
    "reset_answer": "as `cut_answer`, with a reset",
    "stall_answer": "`after` bytes of the answer's body arrive, and no more",
    "trickle_answer": "the answer's body arrives byte by byte, ten in a second",
    "flip_answer": "one byte of the answer's body is changed on the way",
}


@dataclass
class Fault:
    """What is to happen, to which requests (by method and by a part of the address), how often."""

    kind: str
    method: str = ""
    address: str = ""
    times: int = 1
    after: int = 0
    seconds: float = 0.3
    rate: int = 0


@dataclass
class Passed:
    """One request that was seen."""

    method: str
    address: str
    fault: str = ""
    sent: int = 0
    """Bytes of its body that were taken from the client."""
    status: int = 0


class FaultProxy:
    """Listens on loopback; `endpoint` is its address. Use it as a context.

    Args:
        target: the server's endpoint.
        tls: with this, clients talk TLS to it.
    """

    def __init__(self, target: str, tls: ssl.SSLContext | None = None) -> None:
        self._target, self._tls = urlsplit(target), tls
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        # Little lies between the client and what is read here, so a slow or stalled reader is felt at once.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BLOCK)
        self.endpoint = f"{'https' if tls else 'http'}://127.0.0.1:{self._listener.getsockname()[1]}"
        self.log: list[Passed] = []
        self._faults: list[Fault] = []
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._late, self._due = list[threading.Thread](), threading.Event()
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._listener.close()
        with self._lock:
            for client in self._open:
                _shut(client)

    def inject(self, kind: str, method: str = "", address: str = "", **how: int | float) -> None:
        """Do `kind` to the next requests of `method` whose address contains `address`; see `KINDS` and `Fault`."""
        assert kind in KINDS
        with self._lock:
            self._faults.append(Fault(kind, method, address, **how))  # type: ignore[arg-type]

    def heal(self) -> None:
        """Forget all faults that did not happen yet."""
        with self._lock:
            self._faults.clear()

    def let_late_ones_go(self) -> int:
        """Pass on what was held back as `late`, and wait until the server has answered; how many it were."""
        self._due.set()
        for thread in self._late:
            thread.join(60)
        return len(self._late)

    def injected(self) -> int:
        """How many faults happened."""
        return sum(bool(passed.fault) for passed in list(self.log))

    def sent(self, method: str = "", address: str = "") -> int:
        """Bytes of bodies that were taken from clients."""
        return sum(p.sent for p in list(self.log) if p.method.startswith(method) and address in p.address)

    def _take(self, method: str, address: str) -> Fault:
        with self._lock:
            for fault in self._faults:
                if fault.times and method.startswith(fault.method) and fault.address in address:
                    fault.times -= 1
                    return fault
        return Fault("")

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            client.settimeout(60)
            if self._tls is not None:
                client = self._tls.wrap_socket(client, server_side=True)
            with self._lock:
                self._open.add(client)
            with io.BufferedReader(client.makefile("rb", 0), BLOCK) as incoming:
                while self._one(client, incoming):
                    pass
        except (OSError, http.client.HTTPException, _CutError):
            pass
        finally:
            with self._lock:
                self._open.discard(client)
            _shut(client)
            client.close()

    def _one(self, client: socket.socket, incoming: io.BufferedReader[socket.SocketIO]) -> bool:
        """Pass one request on and its answer back; False ends the connection."""
        words = incoming.readline().decode("latin-1").split()
        if len(words) != 3:
            return False
        method, address, _ = words
        headers = http.client.parse_headers(incoming)
        fault = self._take(method, address)
        passed = Passed(method, address, fault.kind)
        self.log.append(passed)
        if fault.kind == "half_open":
            self._hold()
        body = self._body(client, incoming, int(headers.get("Content-Length", 0)), fault, passed)
        if fault.kind in ("slow_down", "error_500", "garbage"):
            for _ in body:
                pass
            client.sendall(_answer_of(fault.kind))
            return fault.kind != "garbage"
        whole = list(body) if fault.kind in ("twice", "late") else None
        if fault.kind == "late":
            self._late.append(threading.Thread(target=self._ask_late, args=(method, address, headers, whole, passed)))
            self._late[-1].start()
            _reset(client)
            raise _CutError
        passed.status, answer_headers, content = self._ask(method, address, headers, whole or body)
        if whole is not None:
            passed.status, answer_headers, content = self._ask(method, address, headers, whole)
        if fault.kind == "lost":
            return False
        if fault.kind == "delay":
            time.sleep(fault.seconds)
        head = [f"HTTP/1.1 {passed.status} {http.client.responses.get(passed.status, '')}"]
        head += [f"{name}: {value}" for name, value in answer_headers]
        client.sendall("\r\n".join([*head, "", ""]).encode("latin-1"))
        self._give(client, content if method != "HEAD" else b"", fault)
        return True

    def _ask_late(
        self, method: str, address: str, headers: http.client.HTTPMessage, body: object, passed: Passed
    ) -> None:
        if self._due.wait(60):
            passed.status, _, _ = self._ask(method, address, headers, body)

    def _ask(
        self, method: str, address: str, headers: http.client.HTTPMessage, body: object
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        server = http.client.HTTPConnection(self._target.hostname or "", self._target.port, timeout=60)
        try:
            server.putrequest(method, address, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                if name.lower() != "expect":
                    server.putheader(name, value)
            server.endheaders()
            for block in body:  # type: ignore[attr-defined]
                server.send(block)
            answer = server.getresponse()
            content = answer.read()
            kept = [
                (name, value)
                for name, value in answer.getheaders()
                if name.lower() not in ("connection", "transfer-encoding", "content-length")
            ]
            length = answer.headers["Content-Length"] if method == "HEAD" else str(len(content))
            return answer.status, [*kept, ("Content-Length", length or "0")], content
        finally:
            server.close()

    def _body(
        self,
        client: socket.socket,
        incoming: io.BufferedReader[socket.SocketIO],
        length: int,
        fault: Fault,
        passed: Passed,
    ) -> Iterator[bytes]:
        broken = fault.kind in ("cut_request", "reset_request", "stall_request")
        left, begun = min(length, fault.after) if broken else length, time.monotonic()
        while left:
            block = incoming.read1(min(left, BLOCK))
            if not block:
                raise _CutError
            left -= len(block)
            passed.sent += len(block)
            if fault.kind == "slow_request":
                time.sleep(max(0.0, begun + passed.sent / fault.rate - time.monotonic()))
            if fault.kind == "flip_request" and passed.sent == len(block):
                block = bytes([block[0] ^ 1]) + block[1:]
            yield block
        if fault.kind == "stall_request":
            self._hold()
        if fault.kind == "reset_request":
            _reset(client)
        if broken:
            raise _CutError

    def _give(self, client: socket.socket, content: bytes, fault: Fault) -> None:
        if fault.kind == "flip_answer" and content:
            content = bytes([content[0] ^ 1]) + content[1:]
        if fault.kind in ("cut_answer", "reset_answer", "stall_answer"):
            client.sendall(content[: min(fault.after, len(content) // 2)])
            if fault.kind == "stall_answer":
                self._hold()
            if fault.kind == "reset_answer":
                _reset(client)
            raise _CutError
        if fault.kind == "trickle_answer":
            for index in range(len(content)):
                client.sendall(content[index : index + 1])
                if self._ended.wait(0.1):
                    raise _CutError
        else:
            client.sendall(content)

    def _hold(self) -> None:
        """Say nothing for as long as the proxy lives."""
        self._ended.wait()
        raise _CutError


class _CutError(Exception):
    """The connection ends here."""


def _answer_of(kind: str) -> bytes:
    if kind == "garbage":
        return os.urandom(300)
    status, code = ("503 Slow Down", "SlowDown") if kind == "slow_down" else ("500 Oops", "InternalError")
    text = ERROR.format(code=code)
    return f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode()


def _reset(client: socket.socket) -> None:
    """Let the close of this socket be a reset."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _shut(client: socket.socket) -> None:
    try:
        linger = struct.unpack("ii", client.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
        if not linger[0]:
            client.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
