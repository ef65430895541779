"""DSSE envelopes: a payload, its type and a signature over both (https://github.com/secure-systems-lab/dsse, 1.0.2)."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelpress.errors import CorruptionError, SignatureError
from modelpress.manifest import canonical_json
from modelpress.strictjson import loads

MAX_ENVELOPE_BYTES = 16 * 2**10
"""An envelope of ours has less than a thousand."""
SIGNATURE_BYTES = 64
"""Of Ed25519."""


@dataclass(frozen=True)
class Envelope:
    """A payload and one signature over it."""

    payload_type: str
    payload: bytes
    key_id: str
    signature: bytes

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return canonical_json(
            {
                "payload": base64.b64encode(self.payload).decode(),
                "payloadType": self.payload_type,
                "signatures": [{"keyid": self.key_id, "sig": base64.b64encode(self.signature).decode()}],
            }
        )

    @classmethod
    def parse(cls, data: bytes, doing: str) -> Envelope:
        """Read what `to_bytes`, or another tool, wrote. Whether the signature is right, it does not say.

        Raises:
            SignatureError: it is larger than `MAX_ENVELOPE_BYTES`, or no envelope with one Ed25519 signature.
        """
        expected = "a DSSE envelope with one signature"
        if len(data) > MAX_ENVELOPE_BYTES:
            raise SignatureError(doing, found=f"{len(data)} bytes", expected=f"at most {MAX_ENVELOPE_BYTES}")
        try:
            written = _Written.model_validate(loads(data, doing))
            payload, signature = _decode(written.payload), _decode(written.signatures[0].sig)
        except CorruptionError as error:
            raise SignatureError(doing, found=error.found, expected=expected) from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise SignatureError(doing, found=f"{where}: {first['msg']}"[:300], expected=expected) from error
        except (binascii.Error, ValueError) as error:
            raise SignatureError(doing, found=f"not base64: {error}", expected=expected) from error
        if len(signature) != SIGNATURE_BYTES:
            raise SignatureError(doing, found=f"a signature of {len(signature)} bytes", expected=f"{SIGNATURE_BYTES}")
        return cls(written.payloadType, payload, written.signatures[0].keyid, signature)


def pae(payload_type: str, payload: bytes) -> bytes:
    """The bytes that are signed: DSSE's pre-authentication encoding, which binds the payload to its type."""
    kind = payload_type.encode()
    return b" ".join([b"DSSEv1", str(len(kind)).encode(), kind, str(len(payload)).encode(), payload])


def _decode(text: str) -> bytes:
    """Base64 in its one spelling."""
    data = base64.b64decode(text, validate=True)
    if base64.b64encode(data).decode() != text:
        raise ValueError("bits behind the last byte")
    return data


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Signature(_Part):
    keyid: str = Field(max_length=256)
    sig: str


class _Written(_Part):
    payload: str
    payloadType: str = Field(max_length=256)  # noqa: N815  DSSE's spelling
    signatures: list[_Signature] = Field(min_length=1, max_length=1)
