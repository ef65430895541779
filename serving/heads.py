"""HTTP's heads, within a time and a size: uvicorn has a limit for neither, and they come before any key.

Without the first, connections that send nothing, or a letter now and then, hold all the places that there are; without
the second, a head that never ends takes all the memory.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 2**16
_SLOW = (b"408 Request Timeout", b"the head of the request did not come in time")
_LARGE = (b"431 Request Header Fields Too Large", b"the head of the request is too large")


class _EndlessHeadError(Exception):
    """Makes the parser give up."""


class Heads(HttpToolsProtocol):
    """A connection. Between two requests uvicorn's own limit for idle ones holds."""

    head_seconds: float = 10.0
    """From the beginning of a connection, or of a request's head, to the head's end."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The clock runs."""
        super().connection_made(transport)
        self._bytes, self._timer = 0, self.loop.call_later(self.head_seconds, self._too_late)
        self._in_head = True

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._timer.cancel()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """A head begins."""
        if not self._in_head:
            self._in_head, self._timer = True, self.loop.call_later(self.head_seconds, self._too_late)
        self._bytes = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A line of the head, or of what may stand behind a body in chunks."""
        self._bytes += len(name) + len(value)
        if self._bytes > MAX_HEAD_BYTES:
            raise _EndlessHeadError
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is here; what comes now is for whoever reads the body."""
        self._timer.cancel()
        self._in_head, self._bytes = False, 0
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Bytes, at most some hundred KiB at a time."""
        pending = self._pending + len(data) if self._in_head else 0
        super().data_received(data)
        self._pending = pending if self._in_head else 0
        if self._pending > MAX_HEAD_BYTES and not self.transport.is_closing():  # one line that does not end
            self._refuse(*_LARGE)

    _pending = 0
    """Bytes of a head that has not ended."""

    def _too_late(self) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:  # the request before is still answered
            self._timer = self.loop.call_later(self.head_seconds, self._too_late)
            return
        self._refuse(*_SLOW)

    def _refuse(self, status: bytes, text: bytes) -> None:
        body = b'{"error": "' + text + b'"}'
        head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (status, len(body)) + body)
        self.transport.close()


def heads_within(seconds: float) -> type[Heads]:
    """`Heads` with another limit of time."""
    return type("Heads", (Heads,), {"head_seconds": seconds})
