"""Signatures of manifests: one object for each key, beside the manifest.

The payload is an in-toto statement (https://in-toto.io/Statement/v1) whose subject is the manifest. It holds no time,
and nothing else that is not fixed by name and digest, so the same key always writes the same bytes, and a reader knows
the payload before it has read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from modelpress import keys
from modelpress.errors import CorruptionError, KeyRefusedError, NotFoundError, SignatureError, TrustError, UnsignedError
from modelpress.manifest import canonical_json
from modelpress.store.base import get_capped, put_once
from modelpress.trust.dsse import MAX_ENVELOPE_BYTES, Envelope
from modelpress.trust.policy import Policy, TrustedKey, now
from modelpress.trust.signer import Signer, holds

if TYPE_CHECKING:
    from modelpress.store.base import Store

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:modelpress:pack:v1"
MAX_TOLD = 20
"""Signatures that an error message tells of."""


@dataclass(frozen=True)
class Signed:
    """A signature that stands beside a manifest."""

    key_id: str
    key: TrustedKey | None
    """The key, where the trust file has it."""
    problem: TrustError | None
    """Why it does not count; None where it does, and where nothing is asked (there is no trust file)."""

    def line(self) -> str:
        """For people."""
        who = f"{self.key.role} {self.key.owner}" if self.key else "unknown key"
        return f"{who} ({self.key_id[:12]})" + (f": {self.problem.found}" if self.problem else "")


def statement(name: str, digest: str) -> bytes:
    """What is signed for a manifest."""
    subject = {"name": keys.manifest(name, digest), "digest": {"sha256": digest}}
    return canonical_json(
        {
            "_type": STATEMENT_TYPE,
            "subject": [subject],
            "predicateType": PREDICATE_TYPE,
            "predicate": {"name": name},
        }
    )


def sign_pack(store: Store, signer: Signer, name: str, digest: str) -> bool:
    """Put a signature beside a manifest. True: this call put it there; one that is there already is the same.

    Raises:
        ConflictError: other bytes stand under its key.
        StoreError: it can't be written.
    """
    key = keys.signature(name, digest, signer.key_id)
    data = signer.envelope(PAYLOAD_TYPE, statement(name, digest)).to_bytes()
    doing = f"signing pack {name}@{digest[:12]}"
    return put_once(store, key, data, doing, expected="no signature, or this one", again="sign")


def check_signer(policy: Policy, signer: Signer | None, name: str, roles: tuple[str, ...], doing: str) -> None:
    """Refuse, before any work, to write what no reader with this trust would take.

    Raises:
        UnsignedError: there is no key to sign with.
        KeyRefusedError: the key is not trusted, not for this name, or has none of the roles.
    """
    if signer is None:
        raise UnsignedError(doing, found="no key to sign with", fix="set MODELPRESS_SIGNING_KEY_FILE")
    key = policy.find(signer.key_id)
    found = key.refusal(name, now()) if key else "not in the trust file"
    if key is not None and found is None and key.role not in roles:
        found = f"of role {key.role}"
    if found is not None:
        raise KeyRefusedError(doing, found=f"own key {signer.key_id[:12]}: {found}", expected=f"a {' or '.join(roles)}")


def check_pack(store: Store, policy: Policy, name: str, digest: str) -> tuple[Signed, ...]:
    """The signatures that a pack needs, one of each role; nothing of the pack itself is read.

    Only objects of keys that count are asked for, so that others may lie there in any number.

    Raises:
        UnsignedError: a role has not signed.
        SignatureError: the signature of a key that counts is malformed, wrong, or of something else.
        KeyRefusedError: there are signatures, by keys that do not count.
        NotFoundError: neither signatures nor the manifest are there.
    """
    moment, counted = now(), list[Signed]()
    for role in policy.required:
        problems: list[TrustError] = []
        for key in policy.keys:
            if key.role != role or key.refusal(name, moment) is not None:
                continue
            found = read_signature(store, policy, name, digest, key.id)
            if found is not None and found.problem is None:
                counted.append(found)
                break
            if found is not None and found.problem is not None:
                problems.append(found.problem)
        else:
            raise problems[0] if problems else _lacking(store, policy, name, digest, role)
    return tuple(counted)


def signatures_of(store: Store, policy: Policy | None, name: str, digest: str, most: int = 1000) -> list[Signed]:
    """The signatures beside a manifest, those that do not count as well; of the first `most` objects there."""
    found = []
    for info in islice(store.list(keys.signatures(name, digest)), most):
        place = keys.place(info.key)
        signed = read_signature(store, policy, name, digest, place.key_id) if place else None
        if signed is not None:
            found.append(signed)
    return found


def read_signature(store: Store, policy: Policy | None, name: str, digest: str, key_id: str) -> Signed | None:
    """The signature of a manifest by one key, judged; None where there is none."""
    place = keys.signature(name, digest, key_id)
    doing = f"checking {store.uri}/{place}"
    key = policy.find(key_id) if policy else None
    try:
        envelope = Envelope.parse(get_capped(store, place, MAX_ENVELOPE_BYTES, doing), doing)
        _judge(envelope, policy, key, keys.signature(name, digest, key_id), doing)
    except NotFoundError:
        return None
    except CorruptionError as error:  # larger than any signature
        return Signed(key_id, key, SignatureError(doing, found=error.found, expected=error.expected))
    except TrustError as error:
        return Signed(key_id, key, error)
    return Signed(key_id, key, None)


def _judge(envelope: Envelope, policy: Policy | None, key: TrustedKey | None, place: str, doing: str) -> None:
    at = keys.place(place)
    assert at is not None
    expected = f"a signature of {keys.manifest(at.name, at.digest)}"
    if (envelope.payload_type, envelope.payload) != (PAYLOAD_TYPE, statement(at.name, at.digest)):
        found = f"a signature of {envelope.payload_type}: {envelope.payload[:300]!r}"
        raise SignatureError(doing, found=found, expected=expected)
    if envelope.key_id != at.key_id:
        raise SignatureError(doing, found=f"a signature by key {envelope.key_id[:64]!r}", expected=f"by {at.key_id}")
    if policy is None:
        return
    if key is None:
        raise KeyRefusedError(doing, found="a key that is not in the trust file", expected=expected)
    refusal = key.refusal(at.name, now())
    if refusal is not None:
        raise KeyRefusedError(doing, found=f"key {key.id[:12]} of {key.owner}: {refusal}", expected=expected)
    if not holds(key.verifier(), envelope):
        raise SignatureError(doing, found="a signature that the key did not make", expected=expected)


def _lacking(store: Store, policy: Policy, name: str, digest: str, role: str) -> TrustError | NotFoundError:
    """The error for a pack that no key of `role` vouches for: it tells what else lies there."""
    doing, expected = f"trusting pack {name}@{digest[:12]} on {store.uri}", f"a signature of role {role!r}"
    others = signatures_of(store, policy, name, digest, MAX_TOLD)
    refused = [other for other in others if other.problem is not None and (not other.key or other.key.role == role)]
    fix = f"have a key of role {role!r} sign it: modelpress sign {name}@{digest[:12]}"
    if refused:
        found = "; ".join(other.line() for other in refused)
        return KeyRefusedError(doing, found=found, expected=expected, fix=fix)
    if not others and store.info(keys.manifest(name, digest)) is None:
        return NotFoundError(doing, found=f"no object {store.uri}/{keys.manifest(name, digest)}")
    found = "; ".join(other.line() for other in others) or "no signature"
    return UnsignedError(doing, found=found, expected=expected, fix=fix)
