"""Decisions that are kept beside packs: what is read back, and every way in which one does not count."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from modelpress import decisions, keys
from modelpress.decisions import MAX_RECORD_BYTES, Page, Record
from modelpress.errors import (
    ConfigError,
    ConflictError,
    CorruptionError,
    FormatError,
    KeyRefusedError,
    NotFoundError,
    SignatureError,
    TrustError,
    UnsignedError,
    UnsupportedFormatError,
)
from modelpress.manifest import canonical_json
from modelpress.pointer import Pointer
from modelpress.reports import Check, Decision, Override
from modelpress.store import Store
from modelpress.store.local import LocalStore
from modelpress.trust import entries as trusted
from tests.trust.conftest import team
from tests.trust.teams import NAME, Team

__all__ = ["team"]

PACK, OTHER = "a" * 64, "b" * 64
REFUSED = Decision(
    promote=False,
    verdict="inconclusive",
    reasons=["quality: inconclusive, too few"],
    required_samples=900,
    checks=[Check(name="quality", verdict="inconclusive", reason="too few", required_samples=900)],
)
FORCED = REFUSED.model_copy(update={"promote": True, "override": Override(by="Anna", reason="it is Friday")})


def keep(store: Store, decision: Decision = REFUSED, pack: str = PACK, name: str = NAME) -> Record:
    return decisions.keep(
        store, name, pack, "champion", decision, champion=OTHER, after=3, gate={"margin": 0.01, "licences": ["MIT"]}
    )


def read(store: Store, record: Record) -> Record:
    return decisions.read(store, record.name, record.pack, record.digest)


def test_what_was_kept_is_read_back_whole(team: Team) -> None:
    made = [keep(team.store("farm"), decision) for decision in (REFUSED, FORCED)]
    for record in made:
        assert read(team.store(), record) == record
        assert record.signature is not None
        assert record.signature.keyid == team.signers["farm"].key_id
    found = decisions.kept(team.store(), NAME, PACK).found[::-1]
    assert [one.record for one in found] == made
    assert [one.problem for one in found] == [None, None]
    assert found[1].record is not None
    assert found[1].record.decision.outcome() == "inconclusive, overridden by Anna: it is Friday"
    assert (found[0].record and found[0].record.after) == 3


def test_each_pack_has_its_own_and_a_name_has_all(team: Team) -> None:
    store = team.store("farm")
    first, second, foreign = keep(store), keep(store, pack=OTHER), keep(store, name="other")
    assert [one.record for one in decisions.kept(store, NAME, OTHER).found] == [second]
    assert [one.record for one in decisions.kept(store, NAME).found] == [second, first]
    assert [one.record for one in decisions.kept(store, "other").found] == [foreign]
    assert decisions.kept(store, "nobody") == Page([], [], None)


def test_without_a_key_nothing_is_signed_and_without_a_trust_file_nothing_is_asked(team: Team) -> None:
    record = keep(team.store())
    assert record.signature is None
    assert "signature" not in json.loads(record.to_bytes())
    assert read(team.store(trusting=False), record) == record
    with pytest.raises(UnsignedError, match="no signature"):
        read(team.store(), record)
    (found,) = decisions.kept(team.store(), NAME).found
    assert found.record == record
    assert isinstance(found.problem, UnsignedError)


def test_a_key_that_may_not_move_aliases_vouches_for_no_decision(team: Team) -> None:
    record = keep(team.store("anna"))
    with pytest.raises(KeyRefusedError, match="of role approver"):
        read(team.store(), record)
    record = keep(team.store("farm"))
    team.change("farm", revoked="2026-01-01T00:00:00Z")
    with pytest.raises(KeyRefusedError, match="revoked"):
        read(team.store(), record)


def test_a_key_of_another_team_vouches_for_none(team: Team, tmp_path_factory: pytest.TempPathFactory) -> None:
    strangers = Team(tmp_path_factory.mktemp("strangers"), mallory="publisher")
    store = team.store()
    store.signer = strangers.signers["mallory"]
    with pytest.raises(KeyRefusedError, match="not in the trust file"):
        read(team.store(), keep(store))


def put(store: Store, document: dict[str, Any] | bytes, pack: str = PACK, name: str = NAME) -> str:
    """Whoever may write to the bucket writes under a name that fits the bytes."""
    data = document if isinstance(document, bytes) else canonical_json(document)
    digest = hashlib.sha256(data).hexdigest()
    store.put(keys.decision(name, pack, digest), data)
    return digest


@pytest.mark.parametrize(
    ("field", "value"),
    [("alias", "other"), ("champion", None), ("after", 9), ("gate", {"margin": 1.0}), ("who", "root@elsewhere")],
)
def test_a_changed_decision_is_not_what_was_signed(team: Team, field: str, value: object) -> None:
    document = json.loads(keep(team.store("farm")).to_bytes())
    digest = put(team.store(), document | {field: value})
    with pytest.raises(SignatureError, match="did not make"):
        decisions.read(team.store(), NAME, PACK, digest)


def test_a_refusal_cannot_be_turned_into_a_promotion(team: Team) -> None:
    document = json.loads(keep(team.store("farm")).to_bytes())
    document["decision"] |= {"promote": True, "verdict": "pass"}
    with pytest.raises(SignatureError):
        decisions.read(team.store(), NAME, PACK, put(team.store(), document))


@pytest.mark.parametrize(("pack", "name"), [(OTHER, NAME), (PACK, "other")])
def test_a_decision_counts_for_no_other_pack(team: Team, pack: str, name: str) -> None:
    """A validly signed object, laid beside another pack."""
    record = keep(team.store("farm"), FORCED)
    digest = put(team.store(), record.to_bytes(), pack, name)
    assert digest == record.digest
    with pytest.raises(CorruptionError, match=f"a decision on {NAME}@{PACK}"):
        decisions.read(team.store(), name, pack, digest)
    (found,) = decisions.kept(team.store(), name, pack).found
    assert (found.record, isinstance(found.problem, CorruptionError)) == (None, True)
    (still,) = decisions.kept(team.store(), NAME, PACK).found
    assert still.record == record, "a copy hides nothing"


def test_a_signature_of_a_pointers_entry_is_none_of_a_decision(team: Team) -> None:
    """The same bytes, signed by the same key, as something else."""
    record = keep(team.store())
    signature = trusted.sign(team.signers["farm"], record.unsigned_bytes())
    forged = record.model_copy(update={"signature": signature})
    with pytest.raises(SignatureError):
        decisions.read(team.store(), NAME, PACK, put(team.store(), forged.to_bytes()))


def test_changed_bytes_under_the_old_name_are_found(team: Team) -> None:
    record = keep(team.store("farm"))
    key = keys.decision(NAME, PACK, record.digest)
    team.store().put(key, record.to_bytes().replace(b'"after":3', b'"after":4'))
    for trusting in (True, False):
        with pytest.raises(CorruptionError, match="sha256"):
            read(team.store(trusting=trusting), record)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", CorruptionError),
        (b"[]", CorruptionError),
        (b'{"format_version":1}', CorruptionError),
        (b'{"format_version":3}', UnsupportedFormatError),
        (b'{"format_version":true}', CorruptionError),
        (b"{" * 3_000, CorruptionError),
        (b" " * (MAX_RECORD_BYTES + 1), CorruptionError),
    ],
    ids=["empty", "list", "bare", "newer", "boolean", "deep", "large"],
)
def test_other_bytes_are_refused(team: Team, data: bytes, kind: type[FormatError]) -> None:
    with pytest.raises(kind):
        decisions.read(team.store(trusting=False), NAME, PACK, put(team.store(), data))


def test_another_spelling_is_refused(team: Team) -> None:
    document = json.loads(keep(team.store("farm")).to_bytes())
    with pytest.raises(CorruptionError, match="another spelling"):
        decisions.read(team.store(), NAME, PACK, put(team.store(), json.dumps(document, indent=1).encode()))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, bytes]:
    """A store with a trust file, and a decision that counts there."""
    team = Team(tmp_path_factory.mktemp("shelf"), farm="publisher")
    return team.store(), keep(team.store("farm"), FORCED).to_bytes()


@settings(max_examples=60)
@given(st.data())
def test_no_change_of_a_byte_passes(shelf: tuple[Store, bytes], data: st.DataObject) -> None:
    store, whole = shelf
    changed = bytearray(whole)
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    digest = put(store, bytes(changed))
    with pytest.raises((FormatError, TrustError)):
        decisions.read(store, NAME, PACK, digest)


def test_the_same_decision_twice_is_one_and_other_bytes_in_its_place_are_told(team: Team) -> None:
    store = team.store("farm")
    record = keep(store)
    key = keys.decision(NAME, PACK, record.digest)
    assert not store.put(key, record.to_bytes(), if_absent=True)

    class Occupied(LocalStore):
        def put(self, key: str, data: Any, *, if_absent: bool = False, sha256: str | None = None) -> bool:
            super().put(key, b"{}")
            return super().put(key, data, if_absent=if_absent, sha256=sha256)

    with pytest.raises(ConflictError, match="other bytes under"):
        keep(Occupied(store.folder))


def test_a_decision_beyond_any_use_is_not_written(team: Team) -> None:
    long = REFUSED.model_copy(update={"reasons": ["x" * MAX_RECORD_BYTES]})
    with pytest.raises(ConfigError, match="at most"):
        keep(team.store(), long)
    assert decisions.kept(team.store(), NAME).found == []


def test_one_that_was_deleted_is_not_found(team: Team) -> None:
    record = keep(team.store("farm"))
    team.store().delete(keys.decision(NAME, PACK, record.digest))
    with pytest.raises(NotFoundError):
        read(team.store(), record)


@pytest.mark.parametrize(
    "fields", [{"by": " ", "reason": "x"}, {"by": "x", "reason": "\n"}, {"by": "x" * 101, "reason": "x"}]
)
def test_an_override_without_a_name_or_a_reason_is_none(fields: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        Override.model_validate(fields)


FIRST_VERSION = {
    "format_version": 1,
    "name": NAME,
    "pack": PACK,
    "alias": "champion",
    "champion": None,
    "after": 0,
    "gate": {"margin": 0.01},
    "decision": REFUSED.model_dump(mode="json"),
    "created": "2026-11-22T12:00:00Z",
    "who": "anna@farm",
}


def test_one_of_the_first_version_is_read_and_chained_as_well(team: Team) -> None:
    store = team.store(trusting=False)
    digest = put(store, FIRST_VERSION)
    assert decisions.read(store, NAME, PACK, digest).before is None
    made = keep(store)
    assert (made.format_version, made.before) == (2, (digest,))
    store.delete(keys.decision(NAME, PACK, digest))
    (gone,) = decisions.kept(store, NAME).gone
    assert gone.key == f"packs/{NAME}/decisions/*/{digest}.json"


@pytest.mark.parametrize(
    "change",
    [
        {"before": []},
        {"format_version": 2},
        {"format_version": 2, "before": ["b" * 64, "a" * 64]},
        {"format_version": 2, "before": ["a" * 64, "a" * 64]},
        {"format_version": 2, "before": ["a"]},
        {"format_version": 2, "before": [f"{number:064x}" for number in range(17)]},
    ],
    ids=["too early", "missing", "unsorted", "twice", "no digest", "too many"],
)
def test_a_chain_that_is_none_is_refused(team: Team, change: dict[str, Any]) -> None:
    with pytest.raises(CorruptionError):
        decisions.read(team.store(trusting=False), NAME, PACK, put(team.store(), FIRST_VERSION | change))


def test_a_refusal_that_was_deleted_is_missed_by_the_next_decision(team: Team) -> None:
    """On whatever pack of the name it was, and from whichever pack one looks."""
    store = team.store("farm")
    refused, other, last = keep(store), keep(store, pack=OTHER), keep(store)
    assert (refused.before, other.before, last.before) == ((), (refused.digest,), (other.digest,))
    assert decisions.kept(store, NAME).gone == []
    store.delete(keys.decision(NAME, OTHER, other.digest))
    for pack in ("", PACK):
        (gone,) = decisions.kept(store, NAME, pack).gone
        assert (gone.record, isinstance(gone.problem, NotFoundError)) == (None, True)
        assert gone.key.endswith(f"/*/{other.digest}.json")
        assert last.digest[:12] in str(gone.problem)


def test_judgements_at_the_same_time_are_both_named_by_the_next(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    store = team.store("farm")
    first = keep(store)
    with monkeypatch.context() as at_once:
        at_once.setattr(decisions, "_newest", lambda *_: (first.digest,))
        both = sorted(keep(store, pack=pack).digest for pack in (PACK, OTHER))
    assert keep(store).before == tuple(both)


def test_what_does_not_count_is_neither_named_nor_believed(team: Team) -> None:
    """Whoever can write to the bucket can't take a decision out of the chain by one that names it, nor raise alarms."""
    first = keep(team.store("farm"))
    forged = keep(team.store())
    assert forged.before == (first.digest,)
    put(team.store(), json.loads(forged.to_bytes()) | {"before": ["c" * 64]})
    assert keep(team.store("farm")).before == (first.digest,)
    assert decisions.kept(team.store(), NAME).gone == []


def test_pages_hold_each_decision_once_and_read_no_more_than_asked(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    store = team.store("farm")
    made = {keep(store, pack=pack).digest for pack in (PACK, OTHER) * 3 + (PACK,)}
    read: list[str] = []
    really = decisions._read

    def counted(store: Store, name: str, pack: str, record: str) -> Record:
        read.append(record)
        return really(store, name, pack, record)

    monkeypatch.setattr(decisions, "_read", counted)
    seen, older = list[str](), None
    for size in (3, 3, 1):
        page = decisions.kept(store, NAME, most=3, older=older)
        assert len(page.found) == size == len(read)
        seen += [one.record.digest for one in page.found if one.record]
        older = page.older
        read.clear()
    assert older is None
    assert (len(seen), set(seen)) == (7, made)
    with pytest.raises(NotFoundError, match="no such decision"):
        decisions.kept(store, NAME, older="d" * 64)


def test_the_decision_of_an_entry_that_is_gone_is_missed(team: Team) -> None:
    store = team.store("farm")
    record, other = keep(store, FORCED), keep(store, FORCED, OTHER)
    said: list[tuple[str, dict[str, Any] | None]] = [
        (PACK, {"record": record.digest}),
        (OTHER, {"record": other.digest}),
        (PACK, {"record": other.digest}),
        (PACK, {"record": "of a caller"}),
        (PACK, None),
    ]
    entries = [
        Pointer(
            name=NAME,
            alias="champion",
            number=number,
            pack=pack,
            previous=None,
            reason="promote",
            decision=decision,
            created=record.created,
            who="anna@farm",
            token="t" * 32,
        )
        for number, (pack, decision) in enumerate(said, 1)
    ]
    assert decisions.unkept(store, NAME, entries) == {3: other.digest}, "a decision on another pack is none"
    store.delete(keys.decision(NAME, PACK, record.digest))
    assert decisions.unkept(store, NAME, entries) == {1: record.digest, 3: other.digest}
    assert decisions.unkept(store, NAME, []) == {}
