"""Keys that AWS KMS keeps: wrapping and opening by its API (Encrypt, Decrypt); the key itself never comes here.

https://docs.aws.amazon.com/kms/latest/APIReference. A publisher needs `kms:Encrypt` and `kms:Decrypt`, a server
`kms:Decrypt`; the encryption context names the model, so that a policy can give a key for one model alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import boto3.session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
)

from modelpress.errors import AccessDeniedError, ConfigError, CorruptionError, StoreError, StoreUnavailableError
from modelpress.settings import Settings, without_logins
from modelpress.store.s3_errors import DENIED, WRONG_KEY, code_of, status_of
from modelpress.store.unlogged import unlogged

REFUSED = {
    *("AccessDeniedException", "UnrecognizedClientException", "InvalidSignatureException", "ExpiredTokenException"),
    *("InvalidClientTokenId", "MissingAuthenticationTokenException", *DENIED, *WRONG_KEY),
}
UNUSABLE = {"NotFoundException", "DisabledException", "KMSInvalidStateException", "InvalidKeyUsageException"}


class KmsKey:
    """A symmetric key of KMS; see `modelpress.cipher.WrappingKey`.

    Args:
        key_id: id, ARN or alias. Opening is asked of this key alone, whatever an entry says: else who can write to the
            store could have a secret opened that was wrapped by a key of theirs.
        settings: endpoint, region, limits.

    Raises:
        ConfigError: the endpoint or the region is not legal.
    """

    algorithm = "aws-kms"

    def __init__(self, key_id: str, settings: Settings) -> None:
        self._key_id, endpoint = key_id, settings.kms_endpoint_url or None
        config = Config(
            connect_timeout=min(settings.s3_connect_seconds, settings.s3_timeout_seconds),
            read_timeout=settings.s3_timeout_seconds,
            retries={"mode": "standard", "total_max_attempts": settings.s3_attempts},
        )
        try:
            # The stubs of boto3 that are installed know S3 alone.
            session: Any = boto3.session.Session()
            self._client = session.client(
                "kms", endpoint_url=endpoint, region_name=_region(key_id) or settings.s3_region, config=config
            )
        except (ValueError, OSError, BotoCoreError) as error:
            found = without_logins(f"endpoint {endpoint!r}, region {settings.s3_region!r}: {error}")
            raise ConfigError(f"opening {self}", found=found, fix="correct MODELPRESS_KMS_ENDPOINT_URL") from None
        self._where = f"endpoint {without_logins(self._client.meta.endpoint_url)}"

    def __str__(self) -> str:
        return f"{self.algorithm} key {self._key_id}"

    def wrap(self, data: bytes, context: Mapping[str, str]) -> tuple[str, bytes]:
        """ARN of the key and wrapped bytes; see `modelpress.cipher.WrappingKey`."""
        with self._translated(f"wrapping a secret with {self}"):
            answer = self._client.encrypt(KeyId=self._key_id, Plaintext=data, EncryptionContext=dict(context))
        return str(answer["KeyId"]), bytes(answer["CiphertextBlob"])

    def unwrap(self, key_id: str, wrapped: bytes, context: Mapping[str, str]) -> bytes | None:  # noqa: ARG002
        """The bytes, or None; see `modelpress.cipher.WrappingKey`. KMS itself knows by which key they were wrapped."""
        doing = f"opening a secret with {self}"
        with self._translated(doing):
            try:
                answer = self._client.decrypt(
                    KeyId=self._key_id, CiphertextBlob=wrapped, EncryptionContext=dict(context)
                )
            except ClientError as error:
                if code_of(error) == "IncorrectKeyException":
                    return None
                if code_of(error) != "InvalidCiphertextException":
                    raise
                expected = ", ".join(f"{name} {value}" for name, value in context.items())
                found = "other bytes, or bytes that were wrapped for another place"
                raise CorruptionError(doing, found=found, expected=expected) from None
        return bytes(answer["Plaintext"])

    @contextlib.contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        """Errors of ours; and no log of what is wrapped or opened."""
        try:
            with unlogged():
                yield
        except ClientError as error:
            raise _refusal(doing, error, self._where) from error
        except (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError) as error:
            fix = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the machine a role"
            raise AccessDeniedError(doing, found=f"{error} ({self._where})", fix=fix) from error
        except BotoCoreError as error:
            raise StoreUnavailableError(
                doing,
                found=without_logins(f"{error} ({self._where})"),
                expected="an answer of KMS",
                fix="check MODELPRESS_KMS_ENDPOINT_URL and the network, then run it again",
            ) from error


def _refusal(doing: str, error: ClientError, where: str) -> StoreError:
    code, status = code_of(error), status_of(error)
    message = error.response.get("Error", {}).get("Message") or ""
    found = f"{code} {message} (HTTP {status}; {where})"
    if code in REFUSED or status in (401, 403):
        fix = "give these credentials kms:Decrypt on the key, and kms:Encrypt to publish"
        return AccessDeniedError(doing, found=found, expected="credentials with the right to this key", fix=fix)
    if code in UNUSABLE:
        fix = "correct MODELPRESS_KMS_KEY_ID, or enable the key; a key that is deleted takes with it all it wrapped"
        return AccessDeniedError(doing, found=found, expected="a symmetric key that is enabled", fix=fix)
    if status in (0, 408, 429) or status >= 500 or "Throttling" in code:
        return StoreUnavailableError(doing, found=found, fix="KMS is busy or broken; run it again later")
    return StoreError(doing, found=found)


def _region(key_id: str) -> str:
    """The region that an ARN names (`arn:aws:kms:REGION:…`)."""
    parts = key_id.split(":")
    return parts[3] if len(parts) > 4 and parts[0] == "arn" else ""
