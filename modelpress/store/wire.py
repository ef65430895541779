"""HTTP/1.1 for object storage: blocks out, one whole answer in, and no wait without an end.

botocore decides what is asked and what an answer means (addresses, credentials, retries, errors); `Wire` carries it, as
a handler of its event ``before-send``. What botocore's own transport lacks, and why this exists: a limit on the whole
of a request, not only on each wait for a byte; bodies that are read, hashed and sent block by block, once; and a limit
on *silence* while sending, where a socket's ``sendall`` limits all of it (and so never gets 64 MiB over a slow line).
See docs/decisions/0019-wire.md for the measurement.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import math
import select
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from botocore.awsrequest import AWSResponse
from botocore.exceptions import (
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    ReadTimeoutError,
    ResponseStreamingError,
    SSLError,
)

from modelpress.errors import StoreUnfitError
from modelpress.store.body import Body
from modelpress.store.clock import awake
from modelpress.store.dial import dial
from modelpress.store.receive import Target

if TYPE_CHECKING:
    from botocore.awsrequest import AWSPreparedRequest
    from typing_extensions import Buffer

MAX_ANSWER_BYTES = 64 * 2**20
"""A longer answer was not asked for: ranges, listings and errors are all shorter."""
MAX_IDLE = 64
"""Connections that are kept for later requests."""
END = "modelpress_end"
"""Key of a request's context: the time (of `clock.awake`) at which it and its repeats are given up."""


class Wire:
    """Connections to object storage, kept and used again; safe to use from threads.

    Args:
        connect: seconds that a connection may take.
        silence: seconds without a byte, in either direction, after which a request is given up.
        deadline: seconds that a request and its repeats may take in all.
        context: how TLS is done; None where the endpoint is plain HTTP.
    """

    def __init__(self, *, connect: float, silence: float, deadline: float, context: ssl.SSLContext | None) -> None:
        self._connect, self._silence, self._deadline, self._context = connect, silence, deadline, context
        self._idle: dict[tuple[str, str, int], list[_Connection]] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._here = threading.local()

    @contextlib.contextmanager
    def receiving(self, target: Target) -> Iterator[None]:
        """What this thread asks for meanwhile is received into `target`, where the answer is a range (206)."""
        self._here.target = target
        try:
            yield
        finally:
            self._here.target = None

    def send(self, request: AWSPreparedRequest, **_: object) -> AWSResponse:
        """Carry one request; botocore's handler of ``before-send.s3``.

        Raises:
            BotoCoreError: no connection, silence, the deadline, or an answer that is not whole.
            ModelpressError: what the body raises.
            StoppedError: the target of what this thread receives was stopped.
        """
        into: Target | None = getattr(self._here, "target", None)
        if into is not None:
            into.check()
        context: dict[str, Any] = request.context  # type: ignore[attr-defined]  # the stubs lack it
        end: float = context.setdefault(END, awake() + self._deadline)
        url = urlsplit(request.url)
        where = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"  # a login is no part of any message
        connection = self._connection(url.scheme, url.hostname or "", url.port, end, where)
        try:
            target = f"{url.path or '/'}?{url.query}" if url.query else url.path or "/"
            status, headers, content = connection.exchange(
                request.method, target, _sent(dict(request.headers.items())), request.body, end, into
            )
        except TimeoutError as error:
            raise ReadTimeoutError(endpoint_url=where, error=error) from error
        except _TooLongError as error:
            if request.headers.get("Range") and error.status == http.HTTPStatus.OK:
                raise StoreUnfitError(
                    f"reading {where}",
                    found=f"{error}, where {_text(request.headers['Range'])} was asked for",
                    expected="ranged reads",
                    fix="use a server, and no proxy before it, that knows the header Range",
                ) from error
            raise ConnectionClosedError(endpoint_url=where, error=error) from error
        except http.client.IncompleteRead as error:
            raise ResponseStreamingError(error=error) from error
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionClosedError(endpoint_url=where, error=error) from error
        finally:
            self._put_back(connection)
        return AWSResponse(request.url, status, headers, _Content(content))  # type: ignore[arg-type]  # it makes a dict

    def close(self) -> None:
        """Close what is idle; what is in use is closed after it."""
        with self._lock:
            self._closed = True
            idle = [connection for kept in self._idle.values() for connection in kept]
            self._idle.clear()
        for connection in idle:
            connection.close()

    def _connection(self, scheme: str, host: str, port: int | None, end: float, where: str) -> _Connection:
        address = (scheme, host, port or (443 if scheme == "https" else 80))
        while True:
            with self._lock:
                kept = self._idle.get(address)
                connection = kept.pop() if kept else None
            if connection is None:
                break
            if connection.fresh():
                return connection
            connection.close()
        left = min(self._connect, end - awake())
        try:
            if left <= 0:
                raise TimeoutError("the deadline has passed")
            return _Connection(address, left, self._silence, self._context if scheme == "https" else None)
        except TimeoutError as error:
            raise ConnectTimeoutError(endpoint_url=where, error=error) from error
        except ssl.SSLError as error:
            raise SSLError(endpoint_url=where, error=error) from error
        except OSError as error:
            raise EndpointConnectionError(endpoint_url=where, error=error) from error

    def _put_back(self, connection: _Connection) -> None:
        with self._lock:
            kept = self._idle.setdefault(connection.address, [])
            keep = connection.ready and not self._closed and len(kept) < MAX_IDLE
            if keep:
                kept.append(connection)
        if not keep:
            connection.close()


class _TooLongError(http.client.HTTPException):
    """An answer that is longer than any that was asked for."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class _Response(http.client.HTTPResponse):
    """An answer, behind whatever the server says before it (102, 103): http.client passes over 100 alone, and would
    take the next for a success without content."""

    def begin(self) -> None:
        super().begin()
        while 100 <= self.status < 200 and self.status != http.HTTPStatus.SWITCHING_PROTOCOLS:
            self.headers = self.msg = None  # type: ignore[assignment]  # with these it would not read again
            super().begin()


class _Connection(http.client.HTTPConnection):
    """One connection, all of whose waits end."""

    response_class = _Response

    def __init__(
        self, address: tuple[str, str, int], connect: float, silence: float, context: ssl.SSLContext | None
    ) -> None:
        self.address, self.ready = address, False
        super().__init__(address[1], address[2])
        self.default_port = 443 if address[0] == "https" else 80
        self.auto_open = 0
        plain = dial(address[1], address[2], connect)
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._line = _Line(context.wrap_socket(plain, server_hostname=address[1]) if context else plain, silence)
        except BaseException:
            plain.close()
            raise
        self.sock = self._line  # http.client calls its sendall, makefile and close

    def fresh(self) -> bool:
        """True if the server has neither said nor closed anything since the last answer."""
        poll = select.poll()  # select() takes no descriptor above 1023, and a server has them
        poll.register(self._line.sock, select.POLLIN)
        return not poll.poll(0)

    def exchange(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str | bytes],
        body: Any,
        end: float,
        into: Target | None = None,
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """Send a request and read its whole answer; `ready` tells whether the connection can take another.

        The bytes of a range go to `into`, if given, and not into the answer.
        """
        self.ready, self._line.end = False, end
        self.putrequest(method, target, skip_accept_encoding=True)
        for name, value in headers.items():
            self.putheader(name, value)
        broken: OSError | None = None
        try:
            self.endheaders()
            for block in body.blocks() if isinstance(body, Body) else [body] if body else []:
                self.send(block)
        except (BrokenPipeError, ConnectionResetError) as error:
            broken = error  # a server that refuses early says why before it closes
        try:
            response = self.getresponse()
            if into is not None and response.status == http.HTTPStatus.PARTIAL_CONTENT:
                into.take(response, self._line.sock)
                content = b""
            elif response.length is not None and response.length > MAX_ANSWER_BYTES:
                raise _TooLongError(f"an answer of {response.length} bytes", response.status)
            else:
                content = response.read(MAX_ANSWER_BYTES + 1) if response.length is None else response.read()
                if len(content) > MAX_ANSWER_BYTES:
                    raise _TooLongError(f"an answer of more than {MAX_ANSWER_BYTES} bytes", response.status)
        except (OSError, http.client.HTTPException) as error:
            if broken is not None:
                raise broken from error
            raise
        if broken is not None and response.status < 300:
            raise broken
        self.ready = broken is None and not response.will_close
        return response.status, response.getheaders(), content


class _Line:
    """A socket that gives up after `silence` seconds without a byte, and at the time `end` in any case."""

    def __init__(self, sock: socket.socket, silence: float) -> None:
        self.sock, self.end = sock, math.inf
        self._silence, self._users = silence, 1

    def wait(self) -> socket.socket:
        """The socket, set to wait no longer than it may."""
        left = self.end - awake()
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        self.sock.settimeout(min(self._silence, left))
        return self.sock

    def sendall(self, data: Buffer) -> None:
        view = memoryview(data)
        while view:
            view = view[self.wait().send(view) :]

    def makefile(self, mode: str) -> io.BufferedReader:
        del mode
        self._users += 1
        return io.BufferedReader(_Reader(self), 2**16)

    def close(self) -> None:
        """Close the socket once neither the connection nor an answer needs it."""
        self._users -= 1
        if not self._users:
            self.sock.close()


class _Reader(io.RawIOBase):
    """What comes in on a line; every read of an answer, its head too, passes here."""

    def __init__(self, line: _Line) -> None:
        super().__init__()
        self._line = line

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        return self._line.wait().recv_into(memoryview(buffer))

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._line.close()


class _Content:
    """The bytes of an answer as botocore reads them."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def read(self, amount: int | None = None) -> bytes:
        del amount  # whole: nobody asks for less
        content, self._content = self._content, b""
        return content

    def stream(self) -> Iterator[bytes]:
        yield self.read()

    def close(self) -> None:
        self._content = b""


def _text(header: str | bytes) -> str:
    return header.decode("latin-1") if isinstance(header, bytes) else header


def _sent(headers: Mapping[str, str | bytes]) -> dict[str, str | bytes]:
    """The headers that go on the line: a body is sent without waiting for leave."""
    return {name: value for name, value in headers.items() if name.lower() not in ("expect", "host")}


def tls_context(ca_bundle: str | None) -> ssl.SSLContext:
    """TLS that verifies the server, against a bundle of certificates (a file or a folder) or botocore's own.

    Raises:
        OSError: the bundle cannot be read.
    """
    from botocore.httpsession import get_cert_path

    path = Path(ca_bundle or str(get_cert_path(True)))
    if path.is_dir():
        return ssl.create_default_context(capath=str(path))
    return ssl.create_default_context(cafile=str(path))
