"""Which versions stay, and why; and what takes how much room."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from modelpress import keys, pointer
from modelpress.cli import app
from modelpress.config import RetentionConfig
from modelpress.errors import CorruptionError, NotFoundError, StoreUnavailableError
from modelpress.housekeeping import intents, turns
from modelpress.housekeeping.retention import retain
from modelpress.housekeeping.usage import usage
from modelpress.store.local import LocalStore
from tests.housekeeping.small import MemoryStore, SmallPack, broken, digest_of

SHORT = RetentionConfig(keep_versions=1, keep_days=0, rollbacks=0)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """Whose clock is everybody's."""
    opened = MemoryStore()

    opened.rules(monkeypatch, "modelpress.pointer", "modelpress.housekeeping.retention")
    return opened


def versions(store: MemoryStore, count: int, name: str = "demo") -> list[SmallPack]:
    packs = [SmallPack([b"shared", b"%d" % number], name=name) for number in range(count)]
    for pack in packs:
        pack.publish(store)
        store.later(days=10)
    return packs


def kept(store: MemoryStore, config: RetentionConfig, *names: str, delete: bool = False) -> dict[str, list[str]]:
    report = retain(store, config, names, delete=delete)
    there = {one.pack for one in report.packs if keys.manifest(one.name, one.pack) in store.objects}
    if delete:
        assert there == {one.pack for one in report.packs if one.keep}
        assert report.removed == len(report.packs) - len(there)
    else:
        assert len(there) == len(report.packs)
    return {one.pack: one.keep for one in report.packs if one.keep}


def test_the_newest_and_the_young_stay(store: MemoryStore) -> None:
    packs = versions(store, 5)
    other = versions(store, 1, "other")[0]
    config = RetentionConfig(keep_versions=2, keep_days=35, rollbacks=0)
    expected = {
        packs[4].digest: ["among the newest 2", "younger than 35 days"],
        packs[3].digest: ["among the newest 2", "younger than 35 days"],
        other.digest: ["among the newest 2", "younger than 35 days"],
    }
    expected = {digest: [why.replace("35", "25") for why in reasons] for digest, reasons in expected.items()}
    config = config.model_copy(update={"keep_days": 25.0})
    assert set(kept(store, config)) == {packs[3].digest, packs[4].digest, other.digest}
    assert kept(store, config, "demo", delete=True)[packs[4].digest] == expected[packs[4].digest]
    assert keys.manifest("other", other.digest) in store.objects


def test_what_aliases_need_stays(store: MemoryStore) -> None:
    packs = versions(store, 6)
    for pack in packs[:3]:
        pointer.append(store, "demo", "champion", pack.digest, "promote")
    pointer.append(store, "demo", "challenger", packs[3].digest, "promote")
    store.later(days=100)
    assert kept(store, SHORT) == {
        packs[2].digest: ["champion points at it"],
        packs[3].digest: ["challenger points at it"],
        packs[5].digest: ["among the newest 1"],
    }
    one_back = SHORT.model_copy(update={"rollbacks": 1})
    assert kept(store, one_back)[packs[1].digest] == ["champion can be rolled back to it"]
    assert packs[0].digest not in kept(store, one_back)
    assert packs[0].digest in kept(store, SHORT.model_copy(update={"rollbacks": None}))
    assert kept(store, one_back, delete=True).keys() == {packs[i].digest for i in (1, 2, 3, 5)}
    assert pointer.rollback(store, "demo", "champion").pack == packs[1].digest
    assert not broken(store)


def test_what_an_alias_pointed_at_lately_stays(store: MemoryStore) -> None:
    packs = versions(store, 3)
    for pack in packs[:2]:
        pointer.append(store, "demo", "champion", pack.digest, "promote")
        store.later(days=20)
    config = SHORT.model_copy(update={"keep_days": 25.0})
    assert kept(store, config)[packs[0].digest][0].startswith("champion pointed at it until")
    store.later(days=10)
    assert packs[0].digest not in kept(store, config)


def test_bases_and_what_is_under_way_stay(store: MemoryStore) -> None:
    packs = versions(store, 3)
    deltas = [SmallPack([b"delta"], base=packs[0].digest)]
    deltas.append(SmallPack([b"delta 2"], base=deltas[0].digest))
    for pack in deltas:
        pack.write(store)
        store.later(days=1)
    with intents.announced(store, "demo", packs[1].digest):
        found = kept(store, SHORT, delete=True)
    assert found[packs[0].digest] == [f"{deltas[0].digest[:12]} is a difference to it"]
    assert found[packs[1].digest] == ["an upload or a promotion under way needs it"]
    assert packs[2].digest not in found


def test_signatures_go_with_their_manifest(store: MemoryStore) -> None:
    packs = versions(store, 2)
    for pack in packs:
        store.put(keys.signature("demo", pack.digest, "d" * 64), b"{}")
    kept(store, SHORT, delete=True)
    assert [key for key in store.objects if ".sigs/" in key] == [keys.signature("demo", packs[1].digest, "d" * 64)]


def test_runs_go_with_their_manifest(store: MemoryStore) -> None:
    packs = versions(store, 2)
    kept_runs = {
        pack.digest: [where("demo", pack.digest, "d" * 64) for where in (keys.run, keys.page)] for pack in packs
    }
    for key in (key for found in kept_runs.values() for key in found):
        store.put(key, b"{}")
    kept(store, SHORT, delete=True)
    assert sorted(key for key in store.objects if "/runs/" in key) == sorted(kept_runs[packs[1].digest])


def test_decisions_outlive_their_pack(store: MemoryStore) -> None:
    packs = versions(store, 2)
    decided = [keys.decision("demo", pack.digest, "e" * 64) for pack in packs]
    for key in decided:
        store.put(key, b"{}")
    kept(store, SHORT, delete=True)
    assert keys.manifest("demo", packs[0].digest) not in store.objects
    assert set(decided) <= set(store.objects)


def test_a_damaged_log_stops_retention(store: MemoryStore) -> None:
    packs = versions(store, 3)
    for pack in packs:
        pointer.append(store, "demo", "champion", pack.digest, "promote")
    store.delete(keys.pointer("demo", "champion", 2))
    with pytest.raises(CorruptionError, match="following the log"):
        retain(store, SHORT, delete=True)
    assert all(keys.manifest("demo", pack.digest) in store.objects for pack in packs)


def test_nothing_is_removed_late_in_a_round(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    packs = versions(store, 2)
    monkeypatch.setattr(turns, "ROUND_SECONDS", 0.0)
    with pytest.raises(StoreUnavailableError, match="no time left"):
        retain(store, SHORT, delete=True)
    assert keys.manifest("demo", packs[0].digest) in store.objects


def test_an_unknown_name(store: MemoryStore) -> None:
    versions(store, 1)
    for call in (lambda: retain(store, SHORT, ["nobody"]), lambda: usage(store, "nobody")):
        with pytest.raises(NotFoundError, match="there are: demo"):
            call()


# --- usage


def test_usage_adds_up(store: MemoryStore) -> None:
    one, two = versions(store, 2)
    alone = versions(store, 1, "other")[0]  # its blobs are those of demo's first
    pointer.append(store, "demo", "champion", two.digest, "promote")
    store.put(keys.blob(digest_of(b"garbage")), b"garbage")
    store.delete(keys.blob(digest_of(b"1")))
    report = usage(store)
    rows = {(row.name, row.pack): row for row in report.versions}
    assert [row.name for row in report.versions] == ["demo", "demo", "other"]
    first, second = rows["demo", one.digest], rows["demo", two.digest]
    assert first.shared_bytes == len(b"shared0")
    assert first.alone_bytes == len(one.manifest.to_bytes())
    assert first.shared_with == [f"demo@{two.digest[:12]}", f"other@{alone.digest[:12]}"]
    assert (second.alone_bytes, second.missing_bytes) == (1 + len(two.manifest.to_bytes()), 1)
    assert (first.aliases, second.aliases) == ([], ["champion"])
    assert report.names["demo"] == len(b"shared01") + sum(len(pack.manifest.to_bytes()) for pack in (one, two))
    assert report.referenced.size_bytes == len(b"shared0")
    assert report.unreferenced.size_bytes == len(b"garbage")
    assert report.total_bytes == sum(len(data) for data, _ in store.objects.values())
    assert [row.name for row in usage(store, "other").versions] == ["other"]
    assert usage(store, "other").versions[0].shared_bytes == first.shared_bytes


# --- the command line


def test_the_commands(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    packs = [SmallPack([b"shared", b"%d" % number]) for number in range(3)]
    for pack in packs:
        pack.publish(store)
    run = lambda *words: CliRunner().invoke(app, [*words, "--store", str(tmp_path / "store")])  # noqa: E731
    shown = run("retain", "demo", "--keep-versions", "2", "--keep-days", "0")
    assert "1 of 3 versions may go" in shown.stdout, shown.stdout
    assert run("retain", "--keep-versions", "2", "--keep-days", "0", "--delete").exit_code == 0
    assert len(list(store.list("packs/"))) == 2
    assert "1 objects, 1 bytes would go" in run("gc", "--grace-hours", "0").stdout
    assert json.loads(run("gc", "--json").stdout)["young"]["objects"] == 1
    assert len(list(store.list(keys.BLOBS))) == 4
    assert "1 objects, 1 bytes went" in run("gc", "--grace-hours", "0", "--delete").stdout
    assert len(list(store.list(keys.BLOBS))) == 3
    assert "each blob counted once" in run("du").stdout
    assert len(json.loads(run("du", "demo", "--json").stdout)["versions"]) == 2


def test_a_signature_is_not_removed_when_the_round_is_over(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who publishes the pack again has waited for the round, and finds its signature there."""
    packs = versions(store, 2)
    signature = keys.signature("demo", packs[0].digest, "d" * 64)
    store.put(signature, b"x")
    clock, delete = [0.0], store.delete
    monkeypatch.setattr(turns, "awake", lambda: clock[0])

    def slow(key: str) -> None:
        delete(key)
        if keys.manifest_owner(key):
            clock[0] += turns.ROUND_SECONDS

    monkeypatch.setattr(store, "delete", slow)
    assert retain(store, SHORT, delete=True).removed == 1
    assert keys.manifest("demo", packs[0].digest) not in store.objects
    assert signature in store.objects  # a collection takes it
