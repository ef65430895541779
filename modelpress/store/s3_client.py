"""The S3 client: boto3, with three of its events taken over.

- ``before-send``: requests travel by `modelpress.store.wire`, which bounds every wait;
- ``choose-signer`` and ``before-sign``: an upload is signed with a digest that is known, unread;
- ``needs-retry``: what is sent again and after which wait, up to a number of attempts and a time in all.
"""

from __future__ import annotations

import hashlib
import random
import threading
import urllib.parse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import boto3.session
import botocore
import botocore.session
from botocore.auth import UNSIGNED_PAYLOAD, S3SigV4Auth
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ConnectionError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    NoCredentialsError,
)
from botocore.utils import get_environ_proxies

from modelpress.errors import ConfigError
from modelpress.settings import Settings, without_logins
from modelpress.store.body import Body
from modelpress.store.clock import awake
from modelpress.store.s3_errors import Where
from modelpress.store.wire import END, Wire, tls_context

if TYPE_CHECKING:
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import ReadOnlyCredentials
    from mypy_boto3_s3.client import S3Client

UPLOADS = ("PutObject", "UploadPart")
TRANSIENT_STATUS = {429, 500, 502, 503, 504}
TRANSIENT_CODES = {
    *("InternalError", "ServiceUnavailable", "SlowDown", "Throttling", "RequestTimeout", "OperationAborted"),
    *("BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "IncompleteBody"),  # changed on the way
}
NOT_REPEATED = {"CreateMultipartUpload"}
"""What would leave one more thing behind each time; see `s3_multipart`."""
NOT_SENT = (ConnectTimeoutError, EndpointConnectionError)
"""There was no connection that a request could have gone over."""
MAX_WAIT_SECONDS = 20.0
SIGNED_HERE = "modelpress_signed"


def connect(bucket: str, settings: Settings) -> tuple[S3Client, Where, Wire | None]:
    """A client of its own session, what error messages may say about it, and what carries its requests.

    Where the environment names a proxy for the endpoint, botocore's own transport is used, which knows proxies: then
    the limit on the whole of a request counts between attempts alone.

    Raises:
        ConfigError: the endpoint, the region or the certificates are not legal.
    """
    core = botocore.session.Session()
    session = boto3.session.Session(botocore_session=core)
    endpoint = settings.s3_endpoint_url or None
    timeout = settings.s3_timeout_seconds
    config = Config(
        connect_timeout=min(settings.s3_connect_seconds, timeout),
        read_timeout=timeout,
        retries={"mode": "standard", "total_max_attempts": 1},  # `_Patience` repeats
        max_pool_connections=64,
        signature_version="s3v4",  # links too, which would else have the signature of 2006
        tcp_keepalive=True,
        # The newer default checksums are refused or dropped by other servers; our digests are signed instead.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"payload_signing_enabled": True, "addressing_style": "path" if endpoint else "auto"},
    )
    try:
        client = session.client("s3", endpoint_url=endpoint, region_name=settings.s3_region, config=config)
        credentials = session.get_credentials()
        wire = _install(client, core, settings)
    except (ValueError, OSError, BotoCoreError) as error:
        found = without_logins(f"endpoint {endpoint!r}, region {settings.s3_region!r}: {error}")
        fix = "set MODELPRESS_S3_ENDPOINT_URL to http://host:port or https://host, and AWS_CA_BUNDLE to a file, if any"
        raise ConfigError(f"opening s3://{bucket}", found=found, fix=fix) from None  # which may show a login
    source = credentials.method if credentials else ""
    return client, Where(endpoint=without_logins(client.meta.endpoint_url), bucket=bucket, credentials=source), wire


def body_digest(client: S3Client, data: bytes | memoryview) -> str | None:
    """What an upload of `data` is signed with: its sha256, and nothing where TLS protects it on the way."""
    return None if client.meta.endpoint_url.startswith("https:") else hashlib.sha256(data).hexdigest()


def _install(client: S3Client, core: botocore.session.Session, settings: Settings) -> Wire | None:
    events: Any = client.meta.events  # the stubs know no answers of handlers
    url = client.meta.endpoint_url
    patience = _Patience(settings.s3_attempts, settings.s3_deadline_seconds, settings.s3_backoff_seconds)
    events.register("needs-retry.s3", patience.wait)
    signer = _Signer(core)
    for operation in UPLOADS:
        events.register(f"choose-signer.s3.{operation}", signer.choose)
        events.register(f"before-sign.s3.{operation}", signer.sign)
    if get_environ_proxies(url).get(urllib.parse.urlsplit(url).scheme):
        return None
    wire = Wire(
        connect=min(settings.s3_connect_seconds, settings.s3_timeout_seconds),
        silence=settings.s3_timeout_seconds,
        deadline=settings.s3_deadline_seconds,
        context=tls_context(core.get_config_variable("ca_bundle")) if url.startswith("https:") else None,
    )
    events.register("before-send.s3", wire.send)
    return wire


class _Signer:
    """Signs uploads with the digest that their body brings, so that signing does not read it."""

    def __init__(self, core: botocore.session.Session) -> None:
        self._core = core

    def choose(self, signature_version: Any, signing_name: str, context: dict[str, Any], **_: object) -> object:
        """botocore is not to sign what is signed here: all that it would sign by SigV4 in its header."""
        if signature_version not in ("v4", "s3v4") or signing_name != "s3":
            return None
        context[SIGNED_HERE] = True
        return botocore.UNSIGNED

    def sign(self, request: AWSRequest, signing_name: str, region_name: str, **_: object) -> None:
        """Sign an upload.

        Raises:
            NoCredentialsError: none were found.
        """
        if not request.context.pop(SIGNED_HERE, False):
            return
        credentials = self._core.get_credentials()
        if credentials is None:
            raise NoCredentialsError()
        body, chosen = request.data, request.context.get("signing", {})
        name, region = chosen.get("signing_name", signing_name), chosen.get("region", region_name)
        auth = S3SigV4Auth(credentials.get_frozen_credentials(), name, region)
        if isinstance(body, Body):
            auth = _DigestAuth(credentials.get_frozen_credentials(), name, region, body.sha256 or UNSIGNED_PAYLOAD)
        auth.add_auth(request)


class _DigestAuth(S3SigV4Auth):
    """SigV4 over a digest that is known."""

    def __init__(self, credentials: ReadOnlyCredentials, service: str, region: str, digest: str) -> None:
        super().__init__(credentials, service, region)
        self._digest = digest

    def payload(self, request: AWSRequest) -> str:  # noqa: ARG002
        return self._digest


class _Patience:
    """Which requests are sent again, and when: full jitter below an exponential bound (Brooker, AWS Architecture Blog,
    2015), never beyond the request's deadline."""

    def __init__(self, attempts: int, deadline: float, backoff: float) -> None:
        self._attempts, self._deadline, self._backoff = attempts, deadline, backoff

    def wait(
        self,
        response: tuple[Any, dict[str, Any]] | None,
        attempts: int,
        caught_exception: Exception | None,
        request_dict: dict[str, Any],
        operation: Any = None,
        **_: object,
    ) -> float | None:
        """Seconds to wait before the next attempt; None for no other one. botocore's handler of ``needs-retry.s3``."""
        if attempts >= self._attempts or not _transient(response, caught_exception):
            return None
        if operation is not None and operation.name in NOT_REPEATED:
            return None
        now = awake()
        seconds = back_off(attempts, self._backoff)
        if now + seconds >= request_dict["context"].setdefault(END, now + self._deadline):
            return None
        return seconds


class Unanswered:
    """Counts the requests of some operations to which the server gave no answer, or one that does not tell whether it
    was the server's: each may have been sent again since, and the server may still act on it."""

    def __init__(self, client: S3Client, operations: Sequence[str]) -> None:
        self._lock, self.count = threading.Lock(), 0
        events: Any = client.meta.events
        for operation in operations:
            events.register(f"needs-retry.s3.{operation}", self._look)

    def _look(
        self, response: tuple[Any, dict[str, Any]] | None, caught_exception: Exception | None = None, **_: object
    ) -> None:
        status = response[1].get("ResponseMetadata", {}).get("HTTPStatusCode", 0) if response else 0
        broken = caught_exception is not None and not isinstance(caught_exception, NOT_SENT)
        if broken or (status >= 500 and status != 503):  # 503 refuses; 500, 502 and 504 may come from a gateway
            with self._lock:
                self.count += 1


def back_off(attempt: int, base: float) -> float:
    """Seconds to wait after attempt number `attempt` (from 1) failed."""
    return random.uniform(0, min(MAX_WAIT_SECONDS, base * 2**attempt))


def _transient(response: tuple[Any, dict[str, Any]] | None, error: Exception | None) -> bool:
    if response is None:
        return isinstance(error, ConnectionError | HTTPClientError)
    parsed = response[1]
    status = parsed.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status >= 400 and (status in TRANSIENT_STATUS or parsed.get("Error", {}).get("Code") in TRANSIENT_CODES)
