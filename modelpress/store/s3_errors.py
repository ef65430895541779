"""What an S3 server's refusal means, said with the endpoint, the bucket and where the credentials came from.

Secrets never appear: only the *source* of the credentials (``env``, ``shared-credentials-file``, ``iam-role``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)

from modelpress.errors import (
    AccessDeniedError,
    ConfigError,
    CorruptionError,
    ModelpressError,
    NotFoundError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
    StoreUnfitError,
)
from modelpress.settings import without_logins

WRONG_KEY = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "TokenRefreshRequired"}
DENIED = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "Forbidden", "403", "401"}
CLOCK = {"RequestTimeTooSkewed"}
FULL = {"QuotaExceeded", "InsufficientStorage", "507", "XMinioStorageFull", "ServiceQuotaExceeded"}
DAMAGED = {"BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "InvalidDigest", "IncompleteBody"}


@dataclass(frozen=True)
class Where:
    """What an error may say about a connection."""

    endpoint: str
    bucket: str
    credentials: str
    """Source of the credentials; empty: none were found."""

    def __str__(self) -> str:
        source = f"credentials from {self.credentials}" if self.credentials else "no credentials found"
        return f"endpoint {self.endpoint}, bucket {self.bucket}, {source}"


def status_of(error: ClientError) -> int:
    """HTTP status of a refusal; 0 if it has none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: ClientError) -> str:
    """S3 error code of a refusal."""
    return str(error.response.get("Error", {}).get("Code", ""))


def translate(doing: str, error: BotoCoreError | ClientError, where: Where) -> ModelpressError:
    """The error of modelpress that says what the SDK's error means."""
    if isinstance(error, ClientError):
        return _refusal(doing, error, where)
    if isinstance(error, NoCredentialsError | PartialCredentialsError | CredentialRetrievalError):
        fix = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the machine a role"
        return AccessDeniedError(doing, found=f"{error} ({where})", fix=fix)
    if isinstance(error, ParamValidationError):
        return ConfigError(doing, found=f"{error} ({where})", expected="a legal bucket name and key")
    return StoreUnavailableError(
        doing,
        found=without_logins(f"{error} ({where})"),
        expected="an answer without MODELPRESS_S3_TIMEOUT_SECONDS of silence, in MODELPRESS_S3_ATTEMPTS attempts and "
        "MODELPRESS_S3_DEADLINE_SECONDS in all",
        fix="check MODELPRESS_S3_ENDPOINT_URL, the network and the server; what was sent is kept, run it again",
    )


@contextlib.contextmanager
def translated(doing: str, where: Where, *, passing: Collection[str] = ()) -> Iterator[None]:
    """Turn the SDK's errors into the store's, except refusals with the codes `passing`."""
    try:
        yield
    except ClientError as error:
        if code_of(error) in passing:
            raise
        raise translate(doing, error, where) from error
    except BotoCoreError as error:
        raise translate(doing, error, where) from error


def _refusal(doing: str, error: ClientError, where: Where) -> ModelpressError:
    code, status = code_of(error), status_of(error)
    said = f"{code or status} {error.response.get('Error', {}).get('Message') or ''}".strip()
    found = f"{said} (HTTP {status}; {where})"
    if code == "NoSuchBucket":
        fix = "create the bucket, or correct MODELPRESS_STORE and MODELPRESS_S3_ENDPOINT_URL"
        return NotFoundError(doing, found=f"no bucket {where.bucket!r}: {found}", fix=fix)
    if code in FULL or status == 507:
        return StoreFullError(doing, found=found, fix="free space or raise the quota, then run it again")
    if code in WRONG_KEY:
        fix = "correct the access key or secret at that source; the secret is not shown here"
        return AccessDeniedError(doing, found=found, expected="a key that this endpoint knows", fix=fix)
    if code in CLOCK:
        return AccessDeniedError(doing, found=found, expected="this machine's clock to be right", fix="set the clock")
    if code in DENIED or status in (401, 403):
        fix = (
            "give this key the right (s3:GetObject, s3:ListBucket to read; s3:PutObject, s3:DeleteObject to write; "
            "s3:ListBucketMultipartUploads, s3:ListMultipartUploadParts, s3:AbortMultipartUpload for large objects)"
        )
        return AccessDeniedError(doing, found=found, expected="a key with this right", fix=fix)
    if status == 404:
        return NotFoundError(doing, found=found)
    if code in DAMAGED:
        return CorruptionError(doing, found=found, expected="the bytes that were signed", fix="run it again")
    if status == 501:
        return StoreUnfitError(doing, found=found, expected="a server with conditional writes, ranges and multipart")
    if status in (409, 429) or status >= 500:
        return StoreUnavailableError(doing, found=found, fix="the server is busy or broken; run it again later")
    return StoreError(doing, found=found)
