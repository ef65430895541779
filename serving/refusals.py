"""What a request is refused with: the kinds of error, and how each is told over HTTP and gRPC.

What the client can mend is told in full; what the operator must mend is told by kind, and is in the log.
"""

from __future__ import annotations

from typing import ClassVar

from modelpress.errors import ModelpressError, ServingError

RETRY_SECONDS = 1
"""What Retry-After says."""
UNFORESEEN = "internal error; the server's log has the details"
"""All that a client learns of an error that nobody foresaw."""


class RequestError(ServingError):
    """The request can't be answered, and its sender can mend it. What it says goes to the client."""

    status: ClassVar[int] = 400
    code: ClassVar[str] = "INVALID_ARGUMENT"
    """Name of gRPC's status."""


class NotServedError(RequestError):
    """No such model or version here."""

    status = 404
    code = "NOT_FOUND"


class TooLargeError(RequestError):
    """The body, or a tensor in it, is over the cap."""

    status = 413


class EncodingError(RequestError):
    """The body is coded (gzip) in a way that is not served."""

    status = 415
    code = "UNIMPLEMENTED"


class NotReadyError(RequestError):
    """The model is known and not loaded; worth another try later."""

    status = 503
    code = "UNAVAILABLE"


class BusyError(RequestError):
    """As many requests as may wait are waiting, of all or of this tenant; worth another try soon."""

    status = 429
    code = "RESOURCE_EXHAUSTED"


class SlowBodyError(RequestError):
    """The body did not arrive in time."""

    status = 408
    code = "DEADLINE_EXCEEDED"


class DeadlineError(RequestError):
    """The deadline that the request set passed before it was answered."""

    status = 504
    code = "DEADLINE_EXCEEDED"


def told(error: ModelpressError, model: str) -> tuple[int, str, str]:
    """HTTP status, name of gRPC's status, and the text for the client of a request for `model`."""
    if isinstance(error, RequestError):
        return error.status, error.code, one_line(error)
    text = f"model {model!r} can't be loaded ({type(error).__name__}); see /v2/repository/index"
    return 503, "UNAVAILABLE", text


def one_line(error: RequestError) -> str:
    """What the client reads."""
    text = f"{error.doing}: found {error.found}" if error.found else error.doing
    return f"{text}; expected {error.expected}" if error.expected else text
