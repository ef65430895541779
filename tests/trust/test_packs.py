"""Signatures of manifests: what counts, and every way in which one does not."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_der_public_key
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpress import keys, load
from modelpress.errors import (
    ConflictError,
    KeyRefusedError,
    NotFoundError,
    SignatureError,
    StoreUnavailableError,
    TrustError,
    TrustFileError,
    UnsignedError,
)
from modelpress.publish import publish
from modelpress.store import Store
from modelpress.store.local import LocalStore
from modelpress.trust import sign_pack, signatures_of
from modelpress.trust.dsse import MAX_ENVELOPE_BYTES, Envelope
from modelpress.trust.packs import statement
from tests.trust.teams import NAME, Team, manifest

PAST, FUTURE = "2020-01-01T00:00:00Z", "2999-01-01T00:00:00Z"


def put(store: Store, note: str = "", name: str = NAME) -> str:
    return publish(store, manifest(note, name), [], {}, source_bytes=1).pack


def signature_key(team: Team, digest: str, owner: str = "farm") -> str:
    return keys.signature(NAME, digest, team.signers[owner].key_id)


def test_what_the_publisher_signed_is_read(team: Team) -> None:
    digest = put(team.store("farm"))
    assert load.load_manifest(team.store(), NAME, digest).digest == digest
    (signed,) = load.check_trust(team.store(), NAME, digest)
    assert signed.line() == f"publisher farm ({team.signers['farm'].key_id[:12]})"
    assert load.verify(team.store(), NAME, digest).signed_by == (signed.line(),)
    assert load.verify(team.store(trusting=False), NAME, digest).signed_by is None


def test_other_tools_can_check_a_signature(team: Team) -> None:
    """By the words of DSSE and in-toto alone, and the library that openssl's users have."""
    digest = put(team.store("farm"))
    envelope = json.loads(team.store().get(signature_key(team, digest)))
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"]
    signed = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
    public = load_der_public_key(base64.b64decode(team.signers["farm"].public_key))
    (signature,) = envelope["signatures"]
    public.verify(base64.b64decode(signature["sig"]), signed)  # type: ignore[union-attr, call-arg]
    document = json.loads(payload)
    assert (kind, document["_type"]) == ("application/vnd.in-toto+json", "https://in-toto.io/Statement/v1")
    assert document["subject"] == [{"name": f"packs/{NAME}/{digest}.json", "digest": {"sha256": digest}}]


class Watched(LocalStore):
    """Notes what is read."""

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        self.read.append(key)  # type: ignore[attr-defined]
        return super().get(key, start, length)


def test_nothing_of_a_pack_is_read_before_its_signature(team: Team) -> None:
    digest = put(team.store())
    store = Watched(team.folder / "store")
    store.read, store.trust = [], team.trust()  # type: ignore[attr-defined]
    with pytest.raises(UnsignedError, match="a signature of role 'publisher'"):
        load.load_manifest(store, NAME, digest)
    assert store.read == []  # type: ignore[attr-defined]
    with pytest.raises(UnsignedError):
        load.load_checkpoint(team.store(), NAME, digest)
    with pytest.raises(NotFoundError):
        load.load_manifest(team.store(), NAME, "0" * 64)


def test_each_required_role_must_sign(team: Team) -> None:
    team.set(required=["publisher", "approver"])
    digest = put(team.store("farm"))
    with pytest.raises(UnsignedError, match="'approver'"):
        load.load_manifest(team.store(), NAME, digest)
    assert sign_pack(team.store(), team.signers["anna"], NAME, digest)
    assert not sign_pack(team.store(), team.signers["anna"], NAME, digest)
    assert len(load.check_trust(team.store(), NAME, digest)) == 2


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"revoked": PAST}, "revoked"),
        ({"revoked": FUTURE}, "revoked"),
        ({"valid_until": PAST}, "expired at 2020"),
        ({"valid_from": FUTURE}, "not valid before 2999"),
        ({"packs": ["other", "dem?x"]}, "not allowed for demo, only for other, dem"),
        ({"role": "auditor"}, "auditor farm"),
    ],
)
def test_a_key_that_does_not_count(team: Team, fields: dict[str, object], said: str) -> None:
    team.add("second")
    team.set()
    digest = put(team.store("farm"))
    load.load_manifest(reader := team.store(), NAME, digest)
    team.change("farm", **fields)
    with pytest.raises(TrustError, match=said) as caught:  # by the reader that ran before the change, too
        load.load_manifest(reader, NAME, digest)
    assert isinstance(caught.value, UnsignedError if "role" in fields else KeyRefusedError)
    with pytest.raises(KeyRefusedError):
        put(team.store("farm"), "another")
    sign_pack(reader, team.signers["second"], NAME, digest)
    load.load_manifest(reader, NAME, digest)


def test_a_key_outside_of_the_trust_file(team: Team) -> None:
    (team.folder / "stranger").mkdir()
    other = Team(team.folder / "stranger", mallory="publisher")
    digest = put(other.store("mallory"))
    theirs = keys.signature(NAME, digest, other.signers["mallory"].key_id)
    put(team.store())
    team.store().put(theirs, other.store().get(theirs))
    with pytest.raises(KeyRefusedError, match="unknown key"):
        load.load_manifest(team.store(), NAME, digest)
    team.store().put(signature_key(team, digest), other.store().get(theirs))  # under a name that counts
    with pytest.raises(SignatureError, match="a signature by key"):
        load.load_manifest(team.store(), NAME, digest)


def copied_from_another(team: Team, digest: str) -> bytes:
    return team.store().get(signature_key(team, put(team.store("farm"), "another")))


def of_another_name(team: Team, digest: str) -> bytes:
    signer = team.signers["farm"]
    return signer.envelope("application/vnd.in-toto+json", statement("other", digest)).to_bytes()


def of_another_kind(team: Team, digest: str) -> bytes:
    return team.signers["farm"].envelope("text/plain", statement(NAME, digest)).to_bytes()


def by_another_key(team: Team, digest: str) -> bytes:
    envelope = team.signers["anna"].envelope("application/vnd.in-toto+json", statement(NAME, digest))
    return Envelope(envelope.payload_type, envelope.payload, team.signers["farm"].key_id, envelope.signature).to_bytes()


def oversized(team: Team, digest: str) -> bytes:
    return team.store().get(signature_key(team, digest)) + b" " * MAX_ENVELOPE_BYTES


def two_signatures(team: Team, digest: str) -> bytes:
    document = json.loads(team.store().get(signature_key(team, digest)))
    return json.dumps(document | {"signatures": document["signatures"] * 2}).encode()


def extra_field(team: Team, digest: str) -> bytes:
    return json.dumps(json.loads(team.store().get(signature_key(team, digest))) | {"more": 1}).encode()


@pytest.mark.parametrize(
    ("forge", "said"),
    [
        (copied_from_another, "found: a signature of"),
        (of_another_name, "found: a signature of"),
        (of_another_kind, "text/plain"),
        (by_another_key, "the key did not make"),
        (oversized, "at most 16384"),
        (two_signatures, "signatures"),
        (extra_field, "more"),
        (lambda *_: b"", "a DSSE envelope"),
        (lambda *_: b"[]", "a DSSE envelope|JSON object"),
        (lambda *_: b"[" * 10_000, "DSSE"),
    ],
)
def test_a_signature_that_is_none(team: Team, forge: Callable[[Team, str], bytes], said: str) -> None:
    digest = put(team.store("farm"))
    team.store().put(signature_key(team, digest), forge(team, digest))
    with pytest.raises(SignatureError, match=said):
        load.load_manifest(team.store(), NAME, digest)
    (signed,) = signatures_of(team.store(), team.trust().policy(), NAME, digest)
    assert isinstance(signed.problem, SignatureError)
    with pytest.raises(ConflictError, match="damaged or tampered"):
        put(team.store("farm"))


@given(place=st.integers(0, 10**6), byte=st.integers(1, 255), cut=st.integers(0, 8), junk=st.binary(max_size=64))
@settings(max_examples=60, deadline=None)
def test_no_changed_envelope_counts(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int, cut: int, junk: bytes
) -> None:
    """Any envelope is refused by name, or says just what it said before."""
    global _kept
    team, digest = _kept = _kept or _signed(tmp_path_factory)
    data = bytearray(team.signers["farm"].envelope("application/vnd.in-toto+json", statement(NAME, digest)).to_bytes())
    data[place % len(data)] ^= byte
    changed = bytes(data[: len(data) - cut]) + (junk if cut else b"")
    team.store().put(signature_key(team, digest), changed)
    try:
        load.check_trust(team.store(), NAME, digest)
    except (SignatureError, KeyRefusedError):
        return
    pytest.fail(f"{changed!r} counts")


_kept: tuple[Team, str] | None = None


def _signed(factory: pytest.TempPathFactory) -> tuple[Team, str]:
    team = Team(factory.mktemp("team"), farm="publisher")
    return team, put(team.store("farm"))


@given(junk=st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_parsing_refuses_junk_by_name(junk: bytes) -> None:
    with pytest.raises(SignatureError):
        Envelope.parse(junk, "reading")


def test_the_trust_file_is_asked_for_each_time(team: Team) -> None:
    digest = put(team.store("farm"))
    reader = team.store()
    load.load_manifest(reader, NAME, digest)
    team.path.write_text(team.path.read_text().replace("required", "requires"))
    with pytest.raises(TrustFileError, match="requires"):
        load.load_manifest(reader, NAME, digest)


def test_a_prefix_of_a_digest_is_not_confused_by_signatures(team: Team) -> None:
    digest = put(team.store("farm"))
    assert load.resolve(team.store(), NAME, digest[:12]) == digest


class Dies(LocalStore):
    """Goes away when the manifest is written."""

    def put(self, key: str, data: bytes | Path, *, if_absent: bool = False, sha256: str | None = None) -> bool:
        if key == keys.manifest(NAME, manifest().digest):
            raise StoreUnavailableError(f"storing {key}", found="no answer")
        return super().put(key, data, if_absent=if_absent, sha256=sha256)


def test_a_publisher_that_dies_before_the_manifest_leaves_no_pack_and_goes_on(team: Team) -> None:
    store = Dies(team.folder / "store")
    store.signer, store.trust = team.signers["farm"], team.trust()
    with pytest.raises(StoreUnavailableError):
        put(store)
    digest = manifest().digest
    assert team.store().info(signature_key(team, digest)) is not None  # nobody can meet a manifest without it
    with pytest.raises(NotFoundError):
        load.load_manifest(team.store(), NAME, digest)
    assert put(team.store("farm")) == digest
    assert load.load_manifest(team.store(), NAME, digest).digest == digest
