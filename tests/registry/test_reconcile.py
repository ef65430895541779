"""Aliases set by hand: each line of the table in `registry.reconcile`, and what moves while one looks."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from modelpress import decisions, keys, pointer
from modelpress.errors import ConflictError, CorruptionError, StoreUnavailableError
from modelpress.settings import Settings
from modelpress.store.local import LocalStore
from registry import gates, promotion, reconcile, runs, versions
from tests.databases import Databases
from tests.registry.shelf import Shelf

CHAMPION = reconcile.CHAMPION


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, databases: Databases) -> MlflowClient:
    folder = tmp_path_factory.mktemp("mlflow")
    return runs.open_client(Settings(home=folder, tracking_uri=databases.mlflow(folder)))


@pytest.fixture
def shelf(client: MlflowClient, tmp_path: Path, request: pytest.FixtureRequest) -> Shelf:
    name = request.node.name.lower().replace("_", "-").split("[")[0][:60].strip("-")
    return Shelf(LocalStore(tmp_path / "store"), client, tmp_path, name)


@pytest.fixture
def first(shelf: Shelf) -> str:
    """The pack that is served, by a promotion as it should be."""
    pack = shelf.publish()
    assert promotion.promote(shelf.store, shelf.client, shelf.name, pack, None).promote
    assert shelf.differing() == []
    return pack


def test_a_click_that_passes_is_served_and_the_second_look_finds_nothing(shelf: Shelf, first: str) -> None:
    second = shelf.publish()
    shelf.click(second)
    assert shelf.differing() == [CHAMPION]
    found = shelf.settle()
    assert (found.action, found.wanted, found.pack) == ("promoted", second, second)
    assert found.decision is not None
    assert [check.name for check in found.decision.checks][:2] == [
        *("quality against the source", "quality against the champion")
    ]
    assert shelf.served() == shelf.named() == second
    entries = pointer.history(shelf.store, shelf.name, CHAMPION)
    assert [(entry.pack, entry.reason) for entry in entries] == [(first, "promote"), (second, reconcile.BY_ALIAS)]
    (kept,) = [one.record for one in decisions.kept(shelf.store, shelf.name, second).found]
    assert kept is not None
    assert kept.decision == found.decision
    assert entries[-1].decision == found.decision.model_dump(mode="json") | {decisions.RECORD: kept.digest}
    assert shelf.differing() == []
    assert shelf.settle().action == "agrees"
    assert len(pointer.history(shelf.store, shelf.name, CHAMPION)) == 2


def test_the_first_champion_of_a_model_may_be_clicked(shelf: Shelf) -> None:
    pack = shelf.publish()
    shelf.click(pack)
    assert shelf.differing() == [CHAMPION]
    assert shelf.settle().action == "promoted"
    assert shelf.served() == pack


def test_a_click_that_the_gate_refuses_is_undone_and_says_so(shelf: Shelf, first: str) -> None:
    worse = shelf.publish(quality=0.1)
    shelf.click(worse)
    found = shelf.settle()
    assert (found.action, found.wanted, found.pack) == ("undone", worse, first)
    assert shelf.named() == shelf.served() == first
    tags = shelf.tags(worse)
    assert tags["undone.alias"] == CHAMPION
    assert tags["undone.at"].endswith(" UTC")
    assert "the gate said fail: quality against the source: fail" in tags["undone.why"]
    said = shelf.description(worse)
    assert said.startswith("How it came to be.")
    assert "alias `champion`, set by hand in MLflow, was set back to version 1: the gate said fail" in said
    assert shelf.differing() == []


def test_a_refused_first_champion_leaves_no_alias(shelf: Shelf) -> None:
    worse = shelf.publish(quality=0.1)
    shelf.click(worse)
    assert shelf.settle().action == "undone"
    assert shelf.named() is None
    assert shelf.served() is None
    assert "was taken away: the gate said fail" in shelf.description(worse)


def test_a_version_without_a_pack_is_undone_and_one_of_another_team_is_left_alone(shelf: Shelf, first: str) -> None:
    foreign = shelf.client.create_model_version(shelf.name, "file:///elsewhere").version
    shelf.client.set_registered_model_alias(shelf.name, CHAMPION, foreign)
    found = shelf.settle()
    assert (found.action, found.version, found.why) == (
        "undone",
        str(foreign),
        "this version carries no pack of modelpress",
    )
    assert shelf.named() == first

    others = f"{shelf.name[:50]}-others"
    shelf.client.create_registered_model(others)
    shelf.client.create_model_version(others, "file:///elsewhere")
    shelf.client.set_registered_model_alias(others, CHAMPION, "1")
    assert reconcile.look(shelf.store, shelf.client, others) == []


@pytest.mark.parametrize("tag", ["../../etc/passwd", "f" * 64])
def test_a_tag_that_names_no_published_pack_is_undone(shelf: Shelf, first: str, tag: str) -> None:
    forged = shelf.client.create_model_version(shelf.name, "file:///elsewhere", tags={"pack": tag}).version
    shelf.client.set_registered_model_alias(shelf.name, CHAMPION, forged)
    assert shelf.settle().action == "undone"
    assert shelf.named() == shelf.served() == first


def test_damaged_bytes_are_not_promoted_by_a_click(shelf: Shelf, first: str) -> None:
    from modelpress import load

    second = shelf.publish()
    key = keys.blob(load.load_manifest(shelf.store, shelf.name, second).shards[0].sha256)
    good = shelf.store.get(key)
    shelf.store.put(key, good[:-1] + bytes([good[-1] ^ 1]))
    shelf.click(second)
    found = shelf.settle()
    assert found.action == "undone"
    assert "its pack can't be served" in found.why
    assert shelf.named() == shelf.served() == first


def test_a_deleted_alias_comes_back(shelf: Shelf, first: str) -> None:
    shelf.client.delete_registered_model_alias(shelf.name, CHAMPION)
    assert shelf.differing() == [CHAMPION]
    assert shelf.settle().action == "followed"
    assert shelf.named() == first
    assert "was set again: the alias was deleted" in shelf.description(first)
    assert shelf.differing() == []


def test_a_rollback_that_mlflow_missed_is_followed_and_not_undone(shelf: Shelf, first: str) -> None:
    second = shelf.publish()
    promotion.promote(shelf.store, shelf.client, shelf.name, second, None)
    pointer.rollback(shelf.store, shelf.name, CHAMPION)  # `modelpress rollback --pointer-only`
    assert shelf.named() == second
    found = shelf.settle()
    assert found.action == "followed"
    assert "MLflow had missed entry 3, a rollback by " in found.why
    assert shelf.named() == shelf.served() == first


def test_an_event_that_comes_after_a_rollback_finds_nothing_to_do(shelf: Shelf, first: str) -> None:
    second = shelf.publish()
    shelf.click(second)
    shelf.settle()
    promotion.rollback(shelf.store, shelf.client, shelf.name, CHAMPION)
    assert shelf.settle().action == "agrees"
    assert shelf.served() == shelf.named() == first


def test_going_back_by_a_click_is_judged_like_any_candidate(shelf: Shelf, first: str) -> None:
    """First is as good as second, so it passes; the log says by whose wish."""
    second = shelf.publish()
    promotion.promote(shelf.store, shelf.client, shelf.name, second, None)
    shelf.click(first)
    assert shelf.settle().action == "promoted"
    assert shelf.served() == first


def test_a_promotion_that_died_before_mlflow_is_ended(
    shelf: Shelf, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = shelf.publish()

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(versions, "follow_pointer", dies)
        with pytest.raises(KeyboardInterrupt):
            promotion.promote(shelf.store, shelf.client, shelf.name, second, None)
    assert (shelf.named(), shelf.served()) == (first, second)
    assert shelf.settle().action == "followed"
    assert shelf.named() == shelf.served() == second


def test_a_promotion_at_the_moment_of_an_undoing_stands(
    shelf: Shelf, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last look and setting the alias back: what is set back must not pass for a click."""
    worse, good = shelf.publish(quality=0.1), shelf.publish()
    shelf.click(worse)
    set_alias, moves = versions.set_alias, [good]

    def meanwhile(client: MlflowClient, version: versions.Version, alias: str) -> None:
        if version.pack == first and moves:
            promotion.promote(shelf.store, shelf.client, shelf.name, moves.pop(), None)
        set_alias(client, version, alias)

    monkeypatch.setattr(versions, "set_alias", meanwhile)
    assert shelf.settle().action == "agrees"
    assert shelf.named() == shelf.served() == good
    assert shelf.differing() == []


def test_a_damaged_pointer_keeps_no_other_model_waiting(shelf: Shelf, first: str) -> None:
    (key,) = [info.key for info in shelf.store.list(keys.pointers(shelf.name, CHAMPION))]
    good = shelf.store.get(key)
    shelf.store.put(key, b"{}")
    assert shelf.differing() == [CHAMPION]
    with pytest.raises(CorruptionError, match="refs/champion/00000001"):
        shelf.settle()
    shelf.store.put(key, good)
    assert shelf.differing() == []


def during_judgement(monkeypatch: pytest.MonkeyPatch, *moves: object) -> None:
    """Let somebody move something each time the gate has just judged."""
    judge, left = promotion.judge, list(moves)

    def meanwhile(*given: object, **named: object) -> promotion.Judged:
        found = judge(*given, **named)  # type: ignore[arg-type]
        if left:
            left.pop(0)()  # type: ignore[operator]
        return found

    monkeypatch.setattr(promotion, "judge", meanwhile)


def test_of_two_quick_clicks_the_second_counts(shelf: Shelf, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    worse, good = shelf.publish(quality=0.1), shelf.publish()
    shelf.click(worse)
    during_judgement(monkeypatch, lambda: shelf.click(good))
    found = shelf.settle()
    assert (found.action, found.wanted) == ("promoted", good)
    assert shelf.named() == shelf.served() == good
    assert "undone.why" not in shelf.tags(worse), "nobody asks for it any more"


def test_a_pointer_that_moves_during_the_judgement_is_judged_against(
    shelf: Shelf, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, clicked = shelf.publish(), shelf.publish()
    shelf.click(clicked)
    during_judgement(monkeypatch, lambda: pointer.append(shelf.store, shelf.name, CHAMPION, other, "promote"))
    found = shelf.settle()
    assert found.action == "promoted"
    packs = [entry.pack for entry in pointer.history(shelf.store, shelf.name, CHAMPION)]
    assert packs == [first, other, clicked]


def test_an_alias_that_never_rests_is_an_error(shelf: Shelf, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = shelf.publish(), shelf.publish()
    shelf.click(one)
    turns = [other if turn % 2 == 0 else one for turn in range(reconcile.MAX_LOOKS)]
    during_judgement(monkeypatch, *[lambda pack=pack: shelf.click(pack) for pack in turns])
    with pytest.raises(ConflictError, match="moved under each of 10 looks"):
        shelf.settle()
    assert shelf.served() == first


class Refusing(LocalStore):
    def put(self, key: str, data: bytes | Path, *, if_absent: bool = False, sha256: str | None = None) -> bool:
        if "/refs/" in key:
            raise StoreUnavailableError(f"storing {key}")
        return super().put(key, data, if_absent=if_absent, sha256=sha256)


def test_a_store_that_is_down_keeps_the_wish_for_the_next_look(shelf: Shelf, first: str) -> None:
    second = shelf.publish()
    shelf.click(second)
    with pytest.raises(StoreUnavailableError):
        reconcile.settle(Refusing(shelf.store.folder), shelf.client, shelf.name, CHAMPION)
    assert (shelf.named(), shelf.served()) == (second, first)
    assert shelf.settle().action == "promoted"


def test_a_pointer_whose_version_was_deleted_is_told(shelf: Shelf, first: str) -> None:
    shelf.client.delete_model_version(shelf.name, versions.carrying(shelf.client, shelf.name, first).number)
    found = shelf.settle()
    assert found.action == "stuck"
    assert "run the optimize flow again" in found.why
    shelf.register(first)
    assert shelf.settle().action == "followed"


def test_other_aliases_belong_to_who_set_them_until_a_gate_was_about_them(shelf: Shelf, first: str) -> None:
    second = shelf.publish(alias="canary")
    shelf.click(second, "mine")
    shelf.click(second, "canary")
    assert shelf.differing() == []
    promotion.judge(shelf.store, shelf.client, shelf.name, second, None)
    assert shelf.differing() == ["canary"]
    assert shelf.settle("canary").action == "promoted"
    assert shelf.served("canary") == second
    assert shelf.served() == first


def test_all_models_are_looked_at_and_foreign_names_are_passed_by(shelf: Shelf, first: str) -> None:
    shelf.client.create_registered_model(f"{shelf.name}, A Name of Theirs")
    shelf.client.delete_registered_model_alias(shelf.name, CHAMPION)
    mine = [found for found in reconcile.look(shelf.store, shelf.client) if found.name == shelf.name]
    assert [found.alias for found in mine] == [CHAMPION]
    assert reconcile.look(shelf.store, shelf.client, "nobody-has-this-name") == []


def test_the_oldest_notes_go_where_mlflow_takes_no_more(shelf: Shelf, first: str) -> None:
    version = versions.carrying(shelf.client, shelf.name, first)
    shelf.client.update_model_version(shelf.name, version.number, "d" * 4500)
    for count in range(40):
        versions.note(shelf.client, version, f"note {count} " + "x" * 90)
    said = shelf.description(first)
    assert len(said) <= versions.MAX_DESCRIPTION
    assert said.startswith("d" * 4500)
    assert "note 39" in said
    assert "note 3 " not in said
    versions.note(shelf.client, version, "y" * 9000)
    assert len(shelf.description(first)) <= versions.MAX_DESCRIPTION


def test_where_the_gate_asks_for_approval_the_alias_goes_back_and_a_person_is_asked(shelf: Shelf, first: str) -> None:
    asking = shelf.publish(approval=True)
    shelf.click(asking)
    asked: list[promotion.Judged] = []

    def ask(judged: promotion.Judged) -> str:
        asked.append(judged)
        assert shelf.named() == asking, "asked before the wish is gone: a crash in between loses none"
        return "the run brave-owl asks for it"

    found = reconcile.settle(shelf.store, shelf.client, shelf.name, CHAMPION, ask=ask)
    assert (found.action, found.pack) == ("asked", first)
    assert shelf.named() == shelf.served() == first
    assert "approval: the run brave-owl asks for it" in shelf.description(asking)
    (judged,) = asked
    shown = gates.fingerprint(asking, judged.decision)
    for approved, by, served in ((False, "Bert", first), (True, "Anna", asking)):
        answer = gates.Approval(approved=approved, by=by, reason="so", at="now", of=shown)
        decision = promotion.promote(shelf.store, shelf.client, shelf.name, asking, None, approval=answer)
        assert decision.promote == approved
        assert shelf.named() == shelf.served() == served
    entry = pointer.current(shelf.store, shelf.name, CHAMPION)
    assert entry is not None
    assert entry.decision is not None
    assert entry.decision["reasons"][-1] == "approval: pass, yes by Anna at now: so"
    assert promotion.promote(shelf.store, shelf.client, shelf.name, asking, None).promote, (
        "who stands asks nobody again"
    )
