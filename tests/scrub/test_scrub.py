"""Reading a whole store: each thing that can be wrong with it is found, named, and nothing else."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from modelpress import decisions, keys, pointer, run_records, scrub
from modelpress.errors import CorruptionError, ModelpressError, NotFoundError, StoreUnavailableError, TrustError
from modelpress.reports import Decision, RunReport
from modelpress.reports.scrub import ScrubReport, ScrubState
from modelpress.store import ObjectInfo, Store
from modelpress.store.local import LocalStore
from modelpress.trust import sign_pack
from tests.conftest import OpenS3
from tests.packs import Pack, make_pack, torch_checkpoint
from tests.trust.teams import Team


@pytest.fixture(scope="module")
def pressed(tmp_path_factory: pytest.TempPathFactory) -> list[Pack]:
    """Two packs of one name; made once, as coding them is most of the work."""
    return [make_pack(tmp_path_factory.mktemp("pack"), torch_checkpoint(seed)) for seed in (1, 2)]


@dataclass
class Place:
    """A team's store with two packs in it, and an alias that went from the first to the second."""

    team: Team
    packs: list[Pack]

    @property
    def store(self) -> LocalStore:
        return self.team.store()

    def scrub(self) -> ScrubReport:
        return scrub.scrub(self.store)

    def blob(self, number: int = 0) -> str:
        return keys.blob(self.packs[1].manifest.shards[number].sha256)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, pressed: list[Pack]) -> Place:
    team = Team(tmp_path_factory.mktemp("team"), farm="publisher", anna="approver")
    store = team.store("farm")
    for pack in pressed:
        pack.publish(store)
        record = keep(store, pack.digest)
        said = record.decision.model_dump(mode="json") | {decisions.RECORD: record.digest}
        pointer.append(store, "demo", "champion", pack.digest, "promote", said)
    return Place(team, pressed)


def keep(store: Store, pack: str, after: int = 1) -> decisions.Record:
    """A decision on a pack, signed where the store has a key."""
    decision = Decision(promote=True, verdict="pass", reasons=[], checks=[])
    return decisions.keep(store, "demo", pack, "champion", decision, champion=None, after=after, gate={})


@pytest.fixture
def place(filled: Place) -> Iterator[Place]:
    """The filled store; as it was, after each test."""
    kept, folder = filled.team.folder / "kept", filled.team.folder / "store"
    shutil.copytree(folder, kept)
    document = copy.deepcopy(filled.team.document)
    yield filled
    shutil.rmtree(folder)
    kept.rename(folder)
    filled.team.set(**document)


def test_a_store_in_order(place: Place) -> None:
    report = place.scrub()
    assert report.errors == 0
    assert report.findings == ()
    assert {row.digest for row in report.packs} == {pack.digest for pack in place.packs}
    assert all("publisher farm" in row.signed_by for row in report.packs)
    assert (report.aliases, report.signatures, report.decisions, report.trusted) == (1, 2, 2, True)
    blobs = {**place.packs[0].manifest.blobs(), **place.packs[1].manifest.blobs()}
    assert (report.blobs, report.blob_bytes) == (len(blobs), sum(blobs.values()))
    assert (report.read_blobs, report.read_bytes) == (report.blobs, report.blob_bytes)
    scrub.check(report)


def flipped(place: Place) -> str:
    data = bytearray(place.store.get(place.blob()))
    data[len(data) // 2] ^= 1
    place.store.put(place.blob(), bytes(data))
    return place.blob()


def shortened(place: Place) -> str:
    place.store.put(place.blob(), place.store.get(place.blob())[:-1])
    return place.blob()


def swapped(place: Place) -> str:
    place.store.put(place.blob(0), place.store.get(place.blob(1)))
    return place.blob(0)


def missing(place: Place) -> str:
    place.store.delete(place.blob())
    return place.blob()


def manifest_changed(place: Place) -> str:
    key = keys.manifest("demo", place.packs[0].digest)
    place.store.put(key, place.store.get(key).replace(b'"unknown"', b'"changed"'))
    return key


def manifest_of_another_name(place: Place) -> str:
    key = keys.manifest("other", place.packs[0].digest)
    place.store.put(key, place.store.get(keys.manifest("demo", place.packs[0].digest)))
    return key


def foreign_object(place: Place) -> str:
    place.store.put("packs/demo/notes.txt", b"hello")
    return "packs/demo/notes.txt"


def foreign_blob(place: Place) -> str:
    place.store.put("blobs/sha256/readme", b"hello")
    return "blobs/sha256/readme"


def signature_removed(place: Place) -> str:
    digest = place.packs[0].digest
    place.store.delete(keys.signature("demo", digest, place.team.signers["farm"].key_id))
    return keys.manifest("demo", digest)


def signature_damaged(place: Place) -> str:
    key = keys.signature("demo", place.packs[0].digest, place.team.signers["anna"].key_id)
    place.store.put(key, b"{}")
    return key


def entry_removed(place: Place) -> str:
    place.store.delete(keys.pointer("demo", "champion", 1))
    return keys.pointers("demo", "champion")


def entry_unsigned(place: Place) -> str:
    last = pointer.history(place.store, "demo", "champion")[-1]
    entry = last.model_copy(
        update={"number": 3, "previous": last.digest, "format_version": 1, "signature": None, "pack": last.pack}
    )
    place.store.put(keys.pointer("demo", "champion", 3), entry.to_bytes())
    return keys.pointers("demo", "champion")


def champion_gone(place: Place) -> str:
    key = keys.manifest("demo", place.packs[1].digest)
    place.store.delete(key)
    return key


def decision_changed(place: Place) -> str:
    (found,) = decisions.kept(place.store, "demo", place.packs[0].digest).found
    place.store.put(found.key, place.store.get(found.key).replace(b'"after":1', b'"after":2'))
    return found.key


def decision_forged(place: Place) -> str:
    (found,) = decisions.kept(place.store, "demo", place.packs[0].digest).found
    assert found.record is not None
    forged = found.record.model_copy(update={"after": 7})
    key = keys.decision("demo", forged.pack, forged.digest)
    place.store.put(key, forged.to_bytes())
    return key


def decision_gone(place: Place) -> str:
    (found,) = decisions.kept(place.store, "demo", place.packs[1].digest).found
    place.store.delete(found.key)
    return found.key


@pytest.mark.parametrize(
    ("harm", "kind", "error"),
    [
        (flipped, "damaged", CorruptionError),
        (shortened, "damaged", CorruptionError),
        (swapped, "damaged", CorruptionError),
        (missing, "missing", NotFoundError),
        (manifest_changed, "damaged", CorruptionError),
        (manifest_of_another_name, "damaged", CorruptionError),
        (foreign_object, "foreign", CorruptionError),
        (foreign_blob, "foreign", CorruptionError),
        (signature_removed, "untrusted", TrustError),
        (signature_damaged, "damaged", CorruptionError),
        (entry_removed, "damaged", CorruptionError),
        (entry_unsigned, "untrusted", TrustError),
        (champion_gone, "missing", NotFoundError),
        (decision_changed, "damaged", CorruptionError),
        (decision_forged, "damaged", CorruptionError),
        (decision_gone, "missing", NotFoundError),
    ],
)
def test_what_is_wrong_is_found_and_named(
    place: Place, harm: Callable[[Place], str], kind: str, error: type[ModelpressError]
) -> None:
    key = harm(place)
    report = place.scrub()
    found = [finding for finding in report.findings if finding.is_error]
    assert [(finding.kind, finding.key) for finding in found] == [(kind, key)]
    assert report.errors == 1
    with pytest.raises(error, match=key) as caught:
        scrub.check(report)
    if kind in ("damaged", "missing") and key.startswith(keys.BLOBS):
        assert f"demo@{place.packs[1].digest[:12]}" in str(caught.value)


def test_what_nothing_refers_to_is_information(place: Place) -> None:
    place.store.put(keys.blob("0" * 64), b"of a run that was killed")
    sign_pack(place.store, place.team.signers["farm"], "demo", "1" * 64)
    report = place.scrub()
    # A blob that nothing refers to is read as well: a publisher would take it for its own.
    assert sorted(finding.kind for finding in report.findings) == ["damaged", "unreferenced", "unreferenced"]
    assert report.errors == 1


def test_the_signature_of_a_revoked_key_is_no_damage(place: Place) -> None:
    new = place.team.add("new-farm")
    place.team.set()
    for pack in place.packs:
        sign_pack(place.store, new, "demo", pack.digest)
    place.team.change("farm", revoked="2026-01-01T00:00:00Z")
    report = place.scrub()
    assert {(finding.kind, finding.key) for finding in report.findings} == {
        ("untrusted", keys.pointers("demo", "champion"))
    }


def test_runs_beside_packs_are_read_with_their_pages(place: Place) -> None:
    told, anybody = RunReport(name="demo", pack=place.packs[0].digest, stages=[]), place.team.store(trusting=False)
    signed = run_records.keep(place.team.store("farm"), told, b"one")
    unsigned = run_records.keep(anybody, told, b"two")
    lost = run_records.keep(place.team.store("farm"), told, b"three")
    report = place.scrub()
    assert (report.findings, report.runs) == ((), 3), "one that nobody signed is in order: nothing is served by it"
    anybody.put(keys.run("demo", signed.pack, signed.digest), b"{}")
    anybody.put(keys.page("demo", unsigned.pack, unsigned.page), b"<script>")
    anybody.delete(keys.page("demo", lost.pack, lost.page))
    report = place.scrub()
    assert {(finding.kind, finding.key) for finding in report.findings} == {
        ("damaged", keys.run("demo", signed.pack, signed.digest)),
        ("damaged", keys.run("demo", unsigned.pack, unsigned.digest)),
        ("missing", keys.run("demo", lost.pack, lost.digest)),
    }
    assert report.runs == 0


def test_decisions_from_before_there_was_trust_and_of_packs_that_are_gone_are_in_order(place: Place) -> None:
    keep(place.team.store(trusting=False), place.packs[0].digest, after=5)
    keep(place.team.store("farm"), "9" * 64)
    report = place.scrub()
    assert (report.findings, report.decisions) == ((), 4)


def test_a_refusal_that_somebody_deleted_is_missed(place: Place) -> None:
    store = place.team.store("farm")
    refused, later = keep(store, place.packs[0].digest, after=8), keep(store, place.packs[1].digest, after=9)
    assert later.before == (refused.digest,)
    store.delete(keys.decision("demo", place.packs[0].digest, refused.digest))
    (finding,) = place.scrub().findings
    assert (finding.kind, finding.pack, finding.is_error) == ("missing", "demo", True)
    assert finding.key == f"packs/demo/decisions/*/{refused.digest}.json"
    assert later.digest in finding.problem


class Cut(LocalStore):
    """A store that goes away after some reads of blobs."""

    reads = 0

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        if key.startswith(keys.BLOBS):
            self.reads += 1
            if self.reads > 3:
                raise StoreUnavailableError("reading", found="no answer")
        return super().get(key, start, length)


def test_a_run_that_was_cut_off_is_continued(place: Place) -> None:
    kept: list[ScrubState] = []
    store = Cut(place.team.folder / "store")
    with pytest.raises(StoreUnavailableError):
        scrub.scrub(store, save=kept.append)
    assert (kept[-1].read_blobs, kept[-1].finished) == (3, None)
    report = scrub.scrub(place.store, state=kept[-1], save=kept.append)
    assert report.resumed_blobs == 3
    assert report.read_blobs == report.blobs - 3
    assert kept[-1].finished is not None
    assert kept[-1].read_blobs == report.blobs
    again = scrub.scrub(place.store, state=kept[-1])
    assert again.read_blobs == report.blobs


def test_damage_that_was_found_before_the_cut_is_told_after_it(place: Place) -> None:
    first = min(info.key for info in place.store.list(keys.BLOBS))
    whole = place.store.get(first)
    place.store.put(first, whole[:-1] + bytes([whole[-1] ^ 1]))
    kept: list[ScrubState] = []
    with pytest.raises(StoreUnavailableError):
        scrub.scrub(Cut(place.team.folder / "store"), save=kept.append)
    assert [finding.key for finding in kept[-1].damaged] == [first]
    assert [finding.key for finding in scrub.scrub(place.store, state=kept[-1]).findings] == [first]
    place.store.put(first, whole)  # mended meanwhile
    assert scrub.scrub(place.store, state=kept[-1]).findings == ()


def test_the_state_of_another_store_is_not_taken(place: Place) -> None:
    report = place.scrub()
    state = ScrubState(uri="s3://other", began=report.began, seen=report.began, after="blobs/sha256/ffff")
    assert scrub.scrub(place.store, state=state).read_blobs == report.blobs


class Noted(LocalStore):
    """Notes the ranges that are read."""

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        if key.startswith(keys.BLOBS):
            self.ranges.append((start, length))  # type: ignore[attr-defined]
        return super().get(key, start, length)


def test_blobs_are_read_in_ranges_at_the_pace_that_is_asked(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelpress.scrub.blobs.RANGE_BYTES", 1000)
    waits: list[float] = []
    monkeypatch.setattr("modelpress.scrub.blobs.time.sleep", waits.append)
    store = Noted(place.team.folder / "store")
    store.ranges = []  # type: ignore[attr-defined]
    report = scrub.scrub(store, bytes_per_second=1000)
    ranges = store.ranges  # type: ignore[attr-defined]
    assert max(length for _, length in ranges) == 1000
    assert sum(length for _, length in ranges) == report.blob_bytes
    assert max(waits) > 0.9 * report.blob_bytes / 1000  # it did not sleep, so what it owes has added up


def test_a_pack_that_is_removed_meanwhile_is_no_loss(place: Place) -> None:
    class Removed(LocalStore):
        def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
            if prefix == keys.BLOBS:
                store: Store = LocalStore(self.folder)
                store.delete(keys.manifest("demo", place.packs[0].digest))
                for digest in set(place.packs[0].manifest.blobs()) - set(place.packs[1].manifest.blobs()):
                    store.delete(keys.blob(digest))
            return super().list(prefix)

    assert scrub.scrub(Removed(place.team.folder / "store")).errors == 0


@pytest.mark.s3
def test_a_bucket_is_read_whole_by_whoever_may_only_read(open_s3: OpenS3, pressed: list[Pack], tmp_path: Path) -> None:
    team = Team(tmp_path, farm="publisher")
    writer = open_s3("writer")
    writer.signer, writer.trust = team.signers["farm"], team.trust()
    pressed[0].publish(writer)
    pointer.append(writer, "demo", "champion", pressed[0].digest, "promote")
    reader = open_s3("reader")
    reader.trust = team.trust()
    report = scrub.scrub(reader)
    assert (report.errors, report.findings, len(report.packs)) == (0, (), 1)
    key = keys.blob(pressed[0].manifest.shards[0].sha256)
    data = writer.get(key)
    writer.put(key, data[:-1] + bytes([data[-1] ^ 1]))
    (finding,) = scrub.scrub(reader).findings
    assert (finding.kind, finding.key) == ("damaged", key)


def test_what_lies_below_a_log_and_is_none_of_it_is_foreign(place: Place) -> None:
    key = f"{keys.pointers('demo', 'champion')}copy/00000007.json"
    place.store.put(key, b"{}")
    assert [(finding.kind, finding.key) for finding in place.scrub().findings] == [("foreign", key)]


def test_a_pack_that_is_removed_between_its_manifest_and_its_signatures_is_no_loss(place: Place) -> None:
    gone = keys.manifest("demo", place.packs[0].digest)

    class Removed(LocalStore):
        def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
            data = super().get(key, start, length)
            if key == gone:
                for info in list(self.list(keys.signatures("demo", place.packs[0].digest))):
                    self.delete(info.key)
                self.delete(gone)
            return data

    store = Removed(place.team.folder / "store")
    store.trust = place.team.trust()
    report = scrub.scrub(store)
    assert report.errors == 0
    assert [row.digest for row in report.packs] == [place.packs[1].digest]
