"""Signatures of pointer entries, of decisions and of runs: inside the entry, over everything else in it."""

from __future__ import annotations

import base64
from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints

from modelpress.errors import KeyRefusedError, SignatureError, UnsignedError
from modelpress.trust.dsse import Envelope
from modelpress.trust.packs import check_signer
from modelpress.trust.policy import KeyId, Policy, now
from modelpress.trust.signer import Signer, holds

PAYLOAD_TYPE = "application/vnd.modelpress.pointer+json"
"""Binds what is signed to what it is: no signature of anything else is one of an entry."""
DECISION_TYPE = "application/vnd.modelpress.decision+json"
"""The same of what a gate decided."""
RUN_TYPE = "application/vnd.modelpress.run+json"
"""The same of what a run did."""


class EntrySignature(BaseModel):
    """One signature of an entry."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    keyid: KeyId
    """The key's id."""
    sig: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{86}==$")]
    """Base64 of the Ed25519 signature over DSSE's encoding of the payload type and the entry without `signature`."""


def sign(signer: Signer, entry: bytes, payload_type: str = PAYLOAD_TYPE) -> EntrySignature:
    """The signature of an entry's bytes without signature."""
    envelope = signer.envelope(payload_type, entry)
    return EntrySignature(keyid=envelope.key_id, sig=base64.b64encode(envelope.signature).decode())


def check(
    policy: Policy,
    signature: EntrySignature | None,
    entry: bytes,
    name: str,
    doing: str,
    payload_type: str = PAYLOAD_TYPE,
) -> None:
    """Refuse an entry that no key vouches for.

    Args:
        policy: whose signatures count.
        signature: the entry's.
        entry: its bytes without signature.
        name: of the pack.
        doing: how errors begin.
        payload_type: what kind of entry it is.

    Raises:
        UnsignedError: it has no signature.
        KeyRefusedError: its key does not count for this.
        SignatureError: the signature is wrong.
    """
    expected = f"an entry signed by a {' or '.join(policy.pointers)}"
    if signature is None:
        fix = "whoever may move this alias signs it: modelpress sign --all; or promote again, with a key"
        raise UnsignedError(doing, found="no signature", expected=expected, fix=fix)
    key = policy.find(signature.keyid)
    if key is None:
        raise KeyRefusedError(doing, found=f"key {signature.keyid}, not in the trust file", expected=expected)
    refusal = key.refusal(name, now()) or (None if key.role in policy.pointers else f"of role {key.role}")
    if refusal is not None:
        fix = "sign it again with a key that counts: modelpress sign --all --signed-by KEY"
        found = f"key {key.id[:12]} of {key.owner}: {refusal}"
        raise KeyRefusedError(doing, found=found, expected=expected, fix=fix)
    raw = base64.b64decode(signature.sig)
    one_spelling = base64.b64encode(raw).decode() == signature.sig
    if not one_spelling or not holds(key.verifier(), Envelope(payload_type, entry, signature.keyid, raw)):
        found = f"a signature that key {key.id[:12]} of {key.owner} did not make of this entry"
        raise SignatureError(doing, found=found, expected=expected)


def check_may_sign(policy: Policy, signer: Signer | None, name: str, doing: str) -> None:
    """Refuse to write an entry that no reader with this trust would take; see `packs.check_signer`."""
    check_signer(policy, signer, name, policy.pointers, doing)
