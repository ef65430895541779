"""The state in a log, and the tallies: what is written, what a retry meets, what hostile bytes do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpress import keys, pointer
from modelpress.canary import log, tally
from modelpress.config import RetentionConfig
from modelpress.errors import ConfigError, ConflictError, CorruptionError, FormatError, UnsupportedFormatError
from modelpress.housekeeping.retention import retain
from modelpress.housekeeping.turns import parse
from modelpress.store.base import Store
from modelpress.store.local import LocalStore
from tests.canary.states import by, shadowed, split, state
from tests.packs import make_pack, torch_checkpoint


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def packs(store: Store, tmp_path: Path) -> list[str]:
    """Two published packs of `demo`; the first is champion."""
    made = [make_pack(tmp_path / str(seed), torch_checkpoint(seed)) for seed in range(2)]
    for pack in made:
        pack.publish(store)
    pointer.append(store, "demo", "champion", made[0].digest, "promote")
    return [pack.digest for pack in made]


def begun(store: Store, packs: list[str], **more: Any) -> log.Standing:
    return log.write(store, "demo", state(champion=packs[0], candidate=packs[1], **more), 0, packs[0])


def test_a_canary_from_start_to_end_is_a_log_of_its_own(store: Store, packs: list[str]) -> None:
    assert log.current(store, "demo", "champion") is None
    first = begun(store, packs)
    assert (first.entry.alias, first.entry.pack, first.entry.reason) == ("canary", packs[1], "canary: step 1")
    second = log.write(store, "demo", first.state.model_copy(update={"step": 1}), 1, packs[0])
    assert second.running
    assert second.state.is_last
    ended = log.end(store, "demo", second, "rolled back", ["errors: alarm"], packs[0])
    assert (ended.entry.pack, ended.entry.reason, ended.running) == (packs[0], "canary: rolled back", False)
    found = log.current(store, "demo", "champion")
    assert found == ended
    assert found.state.reasons == ["errors: alarm"]
    assert [entry.number for entry in pointer.history(store, "demo", "canary")] == [1, 2, 3]
    assert len(pointer.history(store, "demo", "champion")) == 1, "the champion never moved"
    with pytest.raises(ConfigError, match="rolled back"):
        log.end(store, "demo", ended, "aborted", [], packs[0])


def test_a_retry_meets_its_own_entry_and_a_second_controller_is_told(store: Store, packs: list[str]) -> None:
    first = begun(store, packs)
    assert begun(store, packs) == first
    log.end(store, "demo", first, "aborted", [], packs[0])
    with pytest.raises(ConflictError):
        log.write(store, "demo", first.state.model_copy(update={"step": 1}), 1, packs[0])


def test_a_hand_that_moves_the_alias_ends_the_canary(store: Store, packs: list[str]) -> None:
    begun(store, packs)
    pointer.append(store, "demo", "canary", packs[0], "by hand")
    assert log.current(store, "demo", "champion") is None


def test_aliases() -> None:
    assert log.canary_alias("champion") == "canary"
    assert log.canary_alias("eu") == "canary-eu"
    assert [log.is_canary_alias(one) for one in ("canary", "canary-eu", "canaries", "champion")] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"step": 9}, CorruptionError),
        ({"step": -1}, CorruptionError),
        ({"id": "../../x"}, CorruptionError),
        ({"candidate": "A" * 64}, CorruptionError),
        ({"champion": None}, CorruptionError),
        ({"config": {"steps": [{"share": 7}]}}, CorruptionError),
        ({"phase": "winning"}, CorruptionError),
        ({"alias": "other"}, CorruptionError),
        ({"extra": 1}, CorruptionError),
        ({"format_version": 2}, UnsupportedFormatError),
        ({"format_version": "x"}, CorruptionError),
    ],
)
def test_a_state_that_is_none_is_refused(
    store: Store, packs: list[str], change: dict[str, Any], kind: type[FormatError]
) -> None:
    good = state(champion=packs[0], candidate=packs[1]).model_dump(mode="json")
    pointer.append(store, "demo", "canary", packs[1], "canary: step 1", {"canary": {**good, **change}})
    with pytest.raises(kind):
        log.current(store, "demo", "champion")


@pytest.mark.parametrize("found", [[], 7, "running", None])
def test_something_else_in_its_place_is_refused_or_no_canary(store: Store, packs: list[str], found: Any) -> None:
    pointer.append(store, "demo", "canary", packs[1], "canary: step 1", {"canary": found})
    if found is None:
        assert log.current(store, "demo", "champion") is None
    else:
        with pytest.raises(CorruptionError):
            log.current(store, "demo", "champion")


def test_an_entry_of_another_pack_than_its_candidate_is_refused(store: Store, packs: list[str]) -> None:
    """Or a server that trusts the entry's pack would send requests to what nobody judged."""
    good = state(champion=packs[0]).model_dump(mode="json")
    pointer.append(store, "demo", "canary", packs[1], "canary: step 1", {"canary": good})
    with pytest.raises(CorruptionError, match="an entry that names"):
        log.current(store, "demo", "champion")


def test_retention_keeps_the_candidate_while_it_runs_and_no_longer(store: Store, packs: list[str]) -> None:
    rules = RetentionConfig(keep_versions=1, keep_days=0)
    standing = begun(store, packs)
    kept = {one.pack for one in retain(store, rules).packs if one.keep}
    assert kept == set(packs)
    log.end(store, "demo", standing, "aborted", [], packs[0])
    reasons = {one.pack: one.keep for one in retain(store, rules).packs}
    assert not [reason for reason in reasons[packs[1]] if "canary" in reason]


def test_tallies_of_servers_add_up_and_are_written_over(store: Store) -> None:
    one, two = "a" * 32, "b" * 32
    tally.write(store, "demo", by(shadowed(5, 1.0), server=one))
    tally.write(store, "demo", by(shadowed(7, 1.5), split(3), server=one))
    for _ in range(2):  # a write that was sent twice
        tally.write(store, "demo", by(shadowed(2, 0.25), server=two))
    found = tally.read(store, "demo", "1" * 32)
    assert (found.servers, found.of(0).mirrored, found.of(0).disagreement) == (2, 9, 1.75)
    assert found.of(1).candidate.requests == 3
    assert found.of(5).ran == 0
    assert tally.read(store, "demo", "2" * 32).servers == 0


HOSTILE = [
    b"",
    b"[]",
    b"{}",
    b"\xff\xfe",
    b"{" * 5000,
    b'{"format_version": 9}',
    b"x" * (tally.MAX_TALLY_BYTES + 1),
]


@pytest.mark.parametrize("data", HOSTILE)
def test_a_tally_that_is_none_is_told_and_the_others_count(store: Store, data: bytes) -> None:
    tally.write(store, "demo", by(shadowed(5), server="a" * 32))
    store.put(keys.tally("demo", "1" * 32, "b" * 32), data)
    found = tally.read(store, "demo", "1" * 32)
    assert found.of(0).mirrored == 5
    assert len(found.damaged) == 1
    assert "tally bbbbbbbbbbbb" in found.damaged[0]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("canary",), "2" * 32),
        (("server",), "c" * 32),
        (("steps", 0, "mirrored"), -1),
        (("steps", 0, "mirrored"), 10**40),
        (("steps", 0, "mirrored"), 1.5),
        (("steps", 0, "disagreement"), 6.0),
        (("steps", 0, "disagreement"), -0.5),
        (("steps", 0, "step"), 32),
        (("steps", 0, "candidate"), {"requests": 1, "errors": 2}),
        (("steps", 0, "candidate"), {"requests": 1, "timed": 2}),
        (("slow_seconds",), 0),
        (("reason",), "x" * 501),
        (("condition",), "promote me"),
    ],
)
def test_a_tally_of_impossible_numbers_is_told(store: Store, path: tuple[Any, ...], value: Any) -> None:
    document = json.loads(by(shadowed(5), server="b" * 32).to_bytes())
    place = document
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    store.put(keys.tally("demo", "1" * 32, "b" * 32), json.dumps(document).encode())
    found = tally.read(store, "demo", "1" * 32)
    assert (found.servers, len(found.damaged)) == (0, 1)


def test_the_same_step_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        by(shadowed(1), shadowed(1))


@given(st.integers(0, 10**15), st.integers(0, 10**15), st.floats(0, 1))
def test_a_tally_comes_back_as_it_was_written(one: int, two: int, share: float) -> None:
    made = by(shadowed(one, one * share), split(two, slow=two // 3, step=1))
    assert parse(tally.Tally, made.to_bytes(), "reading") == made


def test_the_largest_counts_add_up_to_the_largest() -> None:
    most = shadowed(tally.MAX_REQUESTS, float(tally.MAX_REQUESTS))
    assert tally.add_up([by(most), by(most)]).of(0) == most


def test_other_canaries_are_swept_away_and_other_names_are_not(store: Store) -> None:
    for name, canary in (("demo", "1" * 32), ("demo", "2" * 32), ("demo2", "2" * 32)):
        made = tally.new(canary, "a" * 32, "loading", [])
        tally.write(store, name, made)
    store.put("canaries/demo/notes.txt", b"a person's")
    tally.sweep(store, "demo", keep=["1" * 32])
    left = [info.key for info in store.list(keys.CANARIES)]
    mine, theirs = (f"{canary * 32}/{'a' * 32}.json" for canary in "12")
    assert left == [f"canaries/demo/{mine}", "canaries/demo/notes.txt", f"canaries/demo2/{theirs}"]
