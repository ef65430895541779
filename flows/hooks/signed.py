"""What MLflow signs, and how it is checked: HMAC-SHA256 over `delivery id.timestamp.body`, in base64 behind `v1,`."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SIGNATURE = "x-mlflow-signature"
DELIVERY = "x-mlflow-delivery-id"
TIMESTAMP = "x-mlflow-timestamp"
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_SECONDS = re.compile(r"[0-9]{1,12}")


class RefusedError(Exception):
    """A request that is answered with an HTTP status and a short reason, and otherwise without effect."""

    def __init__(self, status: int, why: str) -> None:
        self.status, self.why = status, why
        super().__init__(status, why)


@dataclass(frozen=True)
class Delivery:
    """One delivery, whose signature held."""

    id: str
    """MLflow's name for it; a repeat of the same request carries the same."""
    sent: int
    """Unix seconds, by MLflow's clock."""


def sign(secret: bytes, delivery: str, timestamp: str, body: bytes) -> str:
    """The signature that MLflow sends."""
    signed = b".".join((delivery.encode(), timestamp.encode(), body))
    return "v1," + base64.b64encode(hmac.new(secret, signed, hashlib.sha256).digest()).decode()


def check(
    headers: Mapping[str, str], body: bytes, secrets: Sequence[bytes], *, now: float, tolerance_seconds: float
) -> Delivery:
    """The delivery that the headers speak of, if one of the secrets signed it lately.

    All secrets are tried, each in constant time. Only who knows one is told more than that it does not hold.

    Raises:
        RefusedError: a header is missing or malformed, the signature does not hold, or it is too old or too new.
    """
    delivery, timestamp = headers.get(DELIVERY, ""), headers.get(TIMESTAMP, "")
    given = headers.get(SIGNATURE, "").encode("latin-1", "replace")
    if not _ID.fullmatch(delivery) or not _SECONDS.fullmatch(timestamp):
        raise RefusedError(401, "not signed by MLflow")
    holds = [hmac.compare_digest(given, sign(secret, delivery, timestamp, body).encode()) for secret in secrets]
    if not any(holds):
        raise RefusedError(401, "not signed by MLflow")
    sent = int(timestamp)
    if abs(now - sent) > tolerance_seconds:
        raise RefusedError(
            401, f"signed {now - sent:.0f} s ago, {tolerance_seconds:.0f} at most: a replay, or clocks that differ"
        )
    return Delivery(delivery, sent)
