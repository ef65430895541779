"""Calls of botocore of which nothing is logged: at level DEBUG it logs bodies, and what it signs with the signature."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

TELLTALES = ("botocore.auth", "botocore.endpoint", "botocore.parsers")


class _Silence(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self.here = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno > logging.DEBUG or not getattr(self.here, "depth", 0)


_SILENCE = _Silence()


@contextlib.contextmanager
def unlogged() -> Iterator[None]:
    """What this thread asks botocore for meanwhile, and what it hears, is a secret."""
    for name in TELLTALES:
        logging.getLogger(name).addFilter(_SILENCE)  # once, however often it is added
    _SILENCE.here.depth = getattr(_SILENCE.here, "depth", 0) + 1
    try:
        yield
    finally:
        _SILENCE.here.depth -= 1
