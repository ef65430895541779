"""Runs that are kept beside packs: what is read back, and every way in which one does not count."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpress import keys, run_records
from modelpress.cipher import LocalKey, seal_bytes, secrets
from modelpress.errors import (
    ConfigError,
    ConflictError,
    CorruptionError,
    EncryptionKeyError,
    FormatError,
    KeyRefusedError,
    NotFoundError,
    SignatureError,
    TrustError,
    UnsignedError,
    UnsupportedFormatError,
)
from modelpress.manifest import Encryption, canonical_json
from modelpress.reports import RunReport
from modelpress.run_records import RunRecord
from modelpress.store import Store
from modelpress.trust import entries as trusted
from tests.page.stories import run_report
from tests.trust.conftest import team
from tests.trust.teams import Team

__all__ = ["team"]

PACK, NAME, PAGE = "a" * 64, "digits", b"<!doctype html>"
KEY = b"K" * 32


def keep(store: Store, run: RunReport | None = None) -> RunRecord:
    return run_records.keep(store, run or run_report(PACK), PAGE)


def read(store: Store, record: RunRecord) -> RunRecord:
    return run_records.read(store, record.name, record.pack, record.digest)


def test_what_was_kept_is_read_back_whole(team: Team) -> None:
    made = [keep(team.store("farm")), keep(team.store("farm"), run_report(PACK, stopped="no"))]
    for record in made:
        assert read(team.store(), record) == record
        assert run_records.read_page(team.store(), record) == PAGE
    assert [one.record for one in run_records.kept(team.store(), NAME, PACK)] == made
    assert run_records.newest(team.store(), NAME, PACK) == (made[1].run, [])
    assert run_records.newest(team.store(), NAME, "b" * 64) == (None, [])
    assert keep(team.store("farm"), made[0].run).page == made[0].page, "the same page is one object"


def test_a_run_counts_without_a_page_too(team: Team) -> None:
    assert not run_records.counts(team.store(), NAME, PACK)
    record = run_records.keep(team.store("farm"), run_report(PACK), None)
    assert read(team.store(), record) == record
    assert json.loads(record.to_bytes())["page"] is None
    assert run_records.counts(team.store(), NAME, PACK)
    assert run_records.newest(team.store(), NAME, PACK) == (record.run, [])
    with pytest.raises(NotFoundError, match=r"(?s)could not be drawn.*modelpress report digits@a"):
        run_records.read_page(team.store(), record)


def test_who_does_not_count_is_not_counted(team: Team) -> None:
    unsigned = keep(team.store(trusting=False))
    other = keep(team.store("anna"))
    for record, error in ((unsigned, UnsignedError), (other, KeyRefusedError)):
        with pytest.raises(error):
            read(team.store(), record)
        assert read(team.store(trusting=False), record) == record, "nothing is asked where there is no trust file"
    found, problems = run_records.newest(team.store(), NAME, PACK)
    assert (found, {type(one) for one in problems}) == (None, {UnsignedError, KeyRefusedError})
    assert all(one.problem is not None for one in run_records.kept(team.store(), NAME, PACK))
    keep(team.store("farm"))
    assert run_records.newest(team.store(), NAME, PACK)[0] is not None


@pytest.fixture
def encryption(team: Team, monkeypatch: pytest.MonkeyPatch) -> Encryption:
    """Of a pack whose secret the key of the environment opens."""
    monkeypatch.setenv("MODELPRESS_KEY", base64.b64encode(KEY).decode())
    identity, _ = secrets.current(team.store(), NAME, [LocalKey(KEY)])
    return Encryption(secret=identity, segment_bytes=1000)


def test_beside_an_encrypted_pack_a_run_is_sealed(
    team: Team, encryption: Encryption, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store = run_report(PACK), team.store()
    record = run_records.keep(team.store("farm"), run, PAGE, encryption)
    assert read(store, record) == record
    assert run_records.told(store, record) == run
    assert run_records.read_page(store, record) == PAGE
    assert run_records.newest(store, NAME, PACK) == (run, [])
    bare = run_records.keep(team.store("farm"), run, None, encryption)
    assert (bare.page, run_records.told(store, bare)) == (None, run)
    stored = {info.key: store.get(info.key) for info in store.list(keys.runs(NAME, PACK))}
    assert {key.rpartition(".")[2] for key in stored} == {"json", "sealed"}
    for word in (b"quantize", b"accuracy", b"conv2", b"127.0.0.1:5000", PAGE):
        assert word in run.model_dump_json().encode() + PAGE, "the search sees it"
        assert not [key for key, data in stored.items() if word in data]
    monkeypatch.delenv("MODELPRESS_KEY")
    assert run_records.counts(store, NAME, PACK), "who signed it is seen without a key"
    assert run_records.check_page(store, record) == stored[_only(stored, "sealed")]
    for reads in (run_records.told, run_records.read_page):
        with pytest.raises(EncryptionKeyError, match="MODELPRESS_KEY_FILE"):
            reads(store, record)
    with pytest.raises(EncryptionKeyError):
        run_records.newest(store, NAME, PACK)
    with pytest.raises(EncryptionKeyError):
        run_records.keep(team.store("farm"), run, PAGE, encryption)
    assert {info.key for info in store.list(keys.runs(NAME, PACK))} == stored.keys(), "nothing is kept in the clear"


def _only(found: dict[str, bytes], ending: str) -> str:
    (key,) = [key for key in found if key.endswith(ending)]
    return key


def test_what_was_sealed_is_a_run_of_this_pack(team: Team, encryption: Encryption) -> None:
    store = team.store(trusting=False)
    good = run_records.keep(store, run_report(PACK), PAGE, encryption)
    document = json.loads(good.to_bytes())
    secret = secrets.find(store, NAME, encryption.secret, [LocalKey(KEY)])
    for content in (canonical_json(run_report("b" * 64).model_dump(mode="json")), b"{}", b"[1]"):
        plain, data = seal_bytes(content, secret, encryption, "sealing")
        inner = {"run": plain.model_dump(), "data": base64.b64encode(data).decode()}
        other = run_records.read(store, NAME, PACK, put(store, document | {"sealed": document["sealed"] | inner}))
        with pytest.raises(CorruptionError):
            run_records.told(store, other)
    data = bytearray(base64.b64decode(document["sealed"]["data"]))
    data[-1] ^= 1
    for text in (base64.b64encode(data).decode(), "no base64!", ""):
        inner = document["sealed"] | {"data": text}
        other = run_records.read(store, NAME, PACK, put(store, document | {"sealed": inner}))
        with pytest.raises(CorruptionError):
            run_records.told(store, other)
    assert run_records.newest(store, NAME, PACK)[0] == run_report(PACK), "they hide no other"
    signed = json.loads(run_records.keep(team.store("farm"), run_report(PACK), PAGE, encryption).to_bytes())
    changed = put(store, signed | {"sealed": signed["sealed"] | {"data": "aaaa"}})
    with pytest.raises(SignatureError):
        run_records.read(team.store(), NAME, PACK, changed)


@pytest.mark.parametrize(
    "change", [{"run": {}}, {"sealed": None}, {"page": None}, {"format_version": 1}], ids=["both", "none", "page", "1"]
)
def test_a_sealed_record_is_one_thing(team: Team, encryption: Encryption, change: dict[str, Any]) -> None:
    store = team.store(trusting=False)
    document = json.loads(run_records.keep(store, run_report(PACK), PAGE, encryption).to_bytes())
    if change.get("run") == {}:
        change = {"run": run_report(PACK).model_dump(mode="json")}
    with pytest.raises(CorruptionError):
        run_records.read(store, NAME, PACK, put(store, document | change))


def put(store: Store, document: dict[str, Any] | bytes, pack: str = PACK, name: str = NAME) -> str:
    """Whoever may write to the bucket writes under a name that fits the bytes."""
    data = document if isinstance(document, bytes) else canonical_json(document)
    digest = hashlib.sha256(data).hexdigest()
    store.put(keys.run(name, pack, digest), data)
    return digest


def test_a_signature_is_of_this_run_and_of_nothing_else(team: Team) -> None:
    document = json.loads(keep(team.store("farm")).to_bytes())
    for change in ({"page": "b" * 64}, {"who": "somebody"}):
        digest = put(team.store("farm"), document | change)
        with pytest.raises(SignatureError):
            run_records.read(team.store(), NAME, PACK, digest)


def test_a_signature_of_a_decision_is_none_of_a_run(team: Team) -> None:
    """The same bytes, signed by the same key, as something else."""
    record = keep(team.store())
    signature = trusted.sign(team.signers["farm"], record.unsigned_bytes(), trusted.DECISION_TYPE)
    forged = record.model_copy(update={"signature": signature})
    with pytest.raises(SignatureError):
        run_records.read(team.store(), NAME, PACK, put(team.store(), forged.to_bytes()))


@pytest.mark.parametrize(("pack", "name"), [("b" * 64, NAME), (PACK, "other")])
def test_a_run_counts_for_no_other_pack(team: Team, pack: str, name: str) -> None:
    """A validly signed object, laid beside another pack."""
    record = keep(team.store("farm"))
    assert put(team.store(), record.to_bytes(), pack, name) == record.digest
    with pytest.raises(CorruptionError, match=f"a run on {NAME}@{PACK}"):
        run_records.read(team.store(), name, pack, record.digest)
    assert run_records.newest(team.store(), name, pack)[0] is None
    assert run_records.newest(team.store(), NAME, PACK) == (record.run, []), "a copy hides nothing"


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", CorruptionError),
        (b"[]", CorruptionError),
        (b'{"format_version":1}', CorruptionError),
        (b'{"format_version":3}', UnsupportedFormatError),
        (b'{"format_version":true}', CorruptionError),
        (b'{"format_version":1,"format_version":1}', CorruptionError),
        (b'{"a":' * 100_000, CorruptionError),
        (b" " * (run_records.MAX_RECORD_BYTES + 1), CorruptionError),
    ],
    ids=["empty", "list", "bare", "newer", "boolean", "twice", "deep", "large"],
)
def test_other_bytes_are_refused(team: Team, data: bytes, error: type[Exception]) -> None:
    store = team.store(trusting=False)
    with pytest.raises(error):
        run_records.read(store, NAME, PACK, put(store, data))


def nested(depth: int) -> dict[str, Any]:
    """Deeper than what pydantic spells, and not so deep that it would not be parsed."""
    found: dict[str, Any] = {}
    for _ in range(depth):
        found = {"a": found}
    return found


@pytest.mark.parametrize("where", ["config", "report"])
def test_one_that_is_too_deep_to_spell_is_refused_and_hides_no_other(team: Team, where: str) -> None:
    made = keep(team.store("farm"))
    document = json.loads(made.to_bytes())
    (document["run"] if where == "config" else document["run"]["stages"][0])[where] = nested(300)
    digest = put(team.store(), document)
    for trusting in (True, False):
        with pytest.raises(CorruptionError):
            run_records.read(team.store(trusting=trusting), NAME, PACK, digest)
        assert run_records.newest(team.store(trusting=trusting), NAME, PACK) == (made.run, [])
    with pytest.raises(ConfigError, match="can be read again"):
        keep(team.store("farm"), made.run.model_copy(update={"config": nested(300)}))
    assert len(run_records.kept(team.store(), NAME, PACK)) == 2, "what nobody could read is not written"


def test_another_spelling_is_refused(team: Team) -> None:
    """Else one run, under one signature, would count as often as anybody spells it."""
    whole = keep(team.store("farm")).to_bytes()
    document = json.loads(whole)
    spellings = {
        "spaces": json.dumps(document, indent=1).encode(),
        "order": json.dumps(dict(reversed(document.items())), separators=(",", ":")).encode(),
        "escapes": json.dumps(document | {"who": "ä"}, sort_keys=True, separators=(",", ":")).encode(),
        "time": canonical_json(document | {"created": document["created"].replace("Z", "+00:00")}),
        "left out": canonical_json({key: value for key, value in document.items() if key != "format_version"}),
        "null": canonical_json(document | {"signature": None}),
    }
    for how, data in spellings.items():
        for trusting in (True, False):
            with pytest.raises(CorruptionError):
                run_records.read(team.store(trusting=trusting), NAME, PACK, put(team.store(), data))
        assert data != whole, how


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, bytes]:
    """A store with a trust file, and a run that counts there."""
    team = Team(tmp_path_factory.mktemp("shelf"), farm="publisher")
    return team.store(), keep(team.store("farm")).to_bytes()


@settings(max_examples=40)
@given(st.data())
def test_no_change_and_no_cut_passes(shelf: tuple[Store, bytes], data: st.DataObject) -> None:
    store, whole = shelf
    changed, place = bytearray(whole), data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        del changed[place:]
    else:
        changed[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises((FormatError, TrustError)):
        run_records.read(store, NAME, PACK, put(store, bytes(changed)))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"format_version": 3}, UnsupportedFormatError),
        ({"format_version": 2}, CorruptionError),
        ({"page": None}, CorruptionError),
        ({"format_version": "1"}, CorruptionError),
        ({"pack": "b" * 64}, CorruptionError),
        ({"name": "other"}, CorruptionError),
        ({"unknown": 1}, CorruptionError),
        ({"run": {}}, CorruptionError),
        ({"created": "yesterday"}, CorruptionError),
    ],
)
def test_what_is_no_run_is_refused(team: Team, change: dict[str, Any], error: type[Exception]) -> None:
    store = team.store(trusting=False)
    document = json.loads(keep(store).to_bytes())
    digest = put(store, document | change)
    with pytest.raises(error):
        run_records.read(store, NAME, PACK, digest)
    assert run_records.newest(store, NAME, PACK)[0] is not None, "it hides no other"


def test_a_run_of_the_first_version_stays_readable(team: Team) -> None:
    """A field that comes later, in a report too, must not be spelled in records of before (`trust.entries.Entry`)."""
    store = team.store(trusting=False)
    digest = put(store, Path(__file__).with_name("v1.json").read_bytes())
    record = run_records.read(store, NAME, PACK, digest)
    assert (record.digest, record.who, record.run.stages[-1].size_bytes) == (digest, "anna@farm", 17_000)


def test_damage_and_limits(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    store = team.store(trusting=False)
    with pytest.raises(ConfigError, match="published nothing"):
        keep(store, run_report(None))
    record = keep(store)
    store.put(keys.page(NAME, PACK, record.page), b"<script>")
    with pytest.raises(CorruptionError):
        run_records.read_page(store, record)
    with pytest.raises(ConflictError):
        keep(store)
    store.delete(keys.page(NAME, PACK, record.page))
    with pytest.raises(NotFoundError):
        run_records.read_page(store, record)
    store.put(keys.run(NAME, PACK, record.digest), b"{}")
    with pytest.raises(CorruptionError):
        read(store, record)
    monkeypatch.setattr(run_records, "MAX_RECORD_BYTES", 100)
    with pytest.raises(ConfigError, match="at most 100"):
        keep(store)
