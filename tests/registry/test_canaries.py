"""Canaries from start to end on a real store and a real MLflow: what each look does, and what it does not do twice."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from modelpress import keys, pointer
from modelpress.canary import log, tally
from modelpress.canary.tally import StepTally
from modelpress.config import CanaryConfig
from modelpress.errors import ConfigError, ConflictError, CorruptionError, NotFoundError, SetupError
from modelpress.settings import Settings
from modelpress.store.local import LocalStore
from registry import canaries, canary_figure, gates, promotion, reconcile, runs, versions
from registry.canaries import Looked
from registry.gates import Approval
from tests.canary.states import CANARY, SHADOW, config, shadowed, split
from tests.databases import Databases
from tests.registry.shelf import Shelf

CONFIG = config({**SHADOW, "hold_seconds": 0}, {**CANARY, "hold_seconds": 0})
GOOD = (shadowed(400, 2.0), split(1000, slow=50))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, databases: Databases) -> MlflowClient:
    folder = tmp_path_factory.mktemp("mlflow")
    return runs.open_client(Settings(home=folder, tracking_uri=databases.mlflow(folder)))


class Case(Shelf):
    """A model with a champion, and a candidate that passes the gate."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.first, self.second = self.publish(), self.publish()
        assert promotion.promote(self.store, self.client, self.name, self.first, None).promote

    def start(self, made: CanaryConfig = CONFIG, pack: str = "") -> log.Standing:
        decision, begun = canaries.start(self.store, self.client, self.name, pack or self.second, made, None)
        assert decision.promote
        assert begun is not None
        return begun

    def served_by(self, *servers: tuple[StepTally, ...], **more: Any) -> None:
        """What so many servers wrote."""
        standing = log.current(self.store, self.name, "champion")
        assert standing is not None
        for number, steps in enumerate(servers):
            made = tally.new(standing.state.id, f"{number:032x}", "taking part", list(steps), **more)
            tally.write(self.store, self.name, made)

    def look(self) -> Looked:
        found = canaries.look(self.store, self.client, self.name, "champion")
        assert found is not None
        return found

    def phase(self) -> str:
        standing = log.current(self.store, self.name, "champion")
        assert standing is not None
        return standing.state.phase

    def entries(self, alias: str = "champion") -> list[str]:
        return [entry.reason for entry in pointer.history(self.store, self.name, alias)]


@pytest.fixture
def case(client: MlflowClient, tmp_path: Path, request: pytest.FixtureRequest) -> Case:
    name = request.node.name.lower().replace("_", "-").split("[")[0][:60].strip("-")
    return Case(LocalStore(tmp_path / "store"), client, tmp_path, name)


def test_a_good_candidate_goes_step_by_step_and_becomes_champion(case: Case, client: MlflowClient) -> None:
    begun = case.start()
    assert list(canaries.running(case.store)) == [(case.name, "champion")]
    assert case.named("canary") == case.second, "MLflow's alias says who is tried"
    assert case.look().action == "wait"
    case.served_by((shadowed(200, 1.0),), (shadowed(200, 1.0),))
    first = case.look()
    assert (first.action, first.step, first.servers, first.requests) == ("step", 1, 2, 400)
    assert case.served() == case.first, "nothing but the canary's own alias has moved"
    case.served_by(GOOD, GOOD)
    done = case.look()
    assert (done.action, done.phase) == ("promote", "promoted")
    assert case.served() == case.named() == case.named("canary") == case.second
    assert case.entries() == ["promote", "canary"]
    assert case.entries("canary") == ["canary: step 1", "canary: step 2", "canary: promoted"]
    assert pointer.history(case.store, case.name, "champion")[-1].decision["promote"] is True
    assert not list(canaries.running(case.store))
    assert canaries.look(case.store, client, case.name, "champion") is None
    assert case.tags(case.second)["canary.phase"] == "promoted"
    assert case.differing() == [], "nothing is left for the reconciliation"
    run = versions.carrying(client, case.name, case.second).run_id
    assert len(client.get_metric_history(run, "canary.errors.evidence")) == 3
    canary_figure.log(client, done)
    picture = Path(
        download_artifacts(run_id=run, artifact_path=canary_figure.ARTIFACT, tracking_uri=client.tracking_uri)
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert begun.state.id


@pytest.mark.parametrize(
    ("steps", "more", "said"),
    [
        ((shadowed(50, 50.0),), {}, "disagreement: alarm"),
        ((GOOD[0], split(40, errors=40)), {}, "errors: alarm"),
        ((GOOD[0], split(500, slow=400)), {}, "latency: alarm"),
    ],
)
def test_a_bad_candidate_goes_and_the_champion_never_moved(
    case: Case, steps: tuple[StepTally, ...], more: dict[str, Any], said: str
) -> None:
    case.start()
    case.served_by(steps)
    done = case.look()
    assert (done.action, done.phase) == ("rollback", "rolled back")
    assert said in done.reasons[0]
    assert case.served() == case.named() == case.named("canary") == case.first
    assert case.entries() == ["promote"]
    assert case.tags(case.second)["canary.phase"] == "rolled back"
    assert said in case.tags(case.second)["canary.why"]
    assert case.start().running, "it may be tried again"


def test_a_server_that_stopped_by_itself_ends_it(case: Case) -> None:
    begun = case.start()
    made = tally.new(begun.state.id, "a" * 32, "stopped", [], reason="it can't be loaded here (SetupError)")
    tally.write(case.store, case.name, made)
    assert "can't be loaded here" in case.look().reasons[0]
    assert case.phase() == "rolled back"


def test_what_the_gate_refuses_is_never_begun(case: Case, client: MlflowClient) -> None:
    bad = case.publish(quality=0.1)
    decision, begun = canaries.start(case.store, client, case.name, bad, CONFIG, None)
    assert (decision.promote, begun) == (False, None)
    assert case.entries("canary") == []


def test_what_has_no_champion_to_be_compared_with_is_refused(client: MlflowClient, tmp_path: Path) -> None:
    shelf = Shelf(LocalStore(tmp_path / "store"), client, tmp_path, "nobody")
    only = shelf.publish()
    with pytest.raises(ConfigError, match="never set"):
        canaries.start(shelf.store, client, "nobody", only, CONFIG, None)
    assert promotion.promote(shelf.store, client, "nobody", only, None).promote
    with pytest.raises(ConfigError, match="the champion itself"):
        canaries.start(shelf.store, client, "nobody", only, CONFIG, None)


def test_one_canary_at_a_time_and_a_start_that_is_repeated_is_the_same(case: Case) -> None:
    begun = case.start()
    assert case.start() == begun
    third = case.publish()
    with pytest.raises(ConflictError, match="canary abort"):
        case.start(pack=third)
    with pytest.raises(ConflictError):
        case.start(config(CANARY))
    assert case.entries("canary") == ["canary: step 1"]


def test_a_look_that_died_after_the_pointer_moved_is_ended_by_the_next(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.start(config({**CANARY, "hold_seconds": 0}))
    case.served_by((split(1000, slow=50, step=0),))

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(log, "end", die)
        with pytest.raises(KeyboardInterrupt):
            case.look()
    assert (case.served(), case.phase()) == (case.second, "running")
    done = case.look()
    assert (done.action, done.phase) == ("promote", "promoted")
    assert case.entries() == ["promote", "canary"]
    assert case.named() == case.second


def test_two_controllers_at_once_do_it_once(case: Case) -> None:
    case.start()
    case.served_by(GOOD)
    ended: list[str] = []

    def look() -> None:
        try:
            ended.append(case.look().action)
        except ConflictError:
            ended.append("conflict")

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ended) == 3
    steps = [reason for reason in case.entries("canary") if reason == "canary: step 2"]
    assert len(steps) == 1
    assert set(ended) <= {"step", "conflict", "promote", "wait"}


@pytest.mark.parametrize("how", ["promotion", "rollback"])
def test_a_champion_that_was_moved_by_somebody_else_aborts_it(case: Case, client: MlflowClient, how: str) -> None:
    if how == "rollback":  # back from the second to the first, while a third is tried
        assert promotion.promote(case.store, client, case.name, case.second, None).promote
    third = case.publish()
    case.start(pack=third)
    case.served_by(GOOD)
    if how == "rollback":
        promotion.rollback(case.store, client, case.name, "champion")
    else:
        assert promotion.promote(case.store, client, case.name, case.second, None).promote
    done = case.look()
    assert (done.action, done.phase) == ("abort", "aborted")
    assert "was moved" in done.reasons[0]
    assert case.served("canary") == case.served() == (case.first if how == "rollback" else case.second)


def test_who_promotes_the_candidate_without_waiting_has_ended_it(case: Case, client: MlflowClient) -> None:
    case.start()
    assert promotion.promote(case.store, client, case.name, case.second, None).promote
    assert case.look().phase == "promoted"


def test_a_candidate_whose_bytes_were_damaged_meanwhile_does_not_take_over(case: Case) -> None:
    from modelpress import load

    case.start(config({**CANARY, "hold_seconds": 0}))
    case.served_by((split(1000, slow=50, step=0),))
    key = keys.blob(load.load_manifest(case.store, case.name, case.second).shards[0].sha256)
    case.store.put(key, case.store.get(key)[:-1] + b"\xff")
    done = case.look()
    assert (done.action, case.served(), case.phase()) == ("rollback", case.first, "rolled back")
    assert "can't be served any more" in done.reasons[0]


def test_a_candidate_that_the_gate_refuses_at_the_end_does_not_take_over(case: Case, client: MlflowClient) -> None:
    fast = case.publish(min_speedup=1.5)
    version = versions.carrying(client, case.name, fast)
    versions.annotate(client, version, {"speedup": "2.0"})
    case.start(config({**CANARY, "hold_seconds": 0}), pack=fast)
    case.served_by((split(1000, slow=50, step=0),))
    versions.annotate(client, version, {"speedup": "1.1"})  # it was measured again meanwhile
    done = case.look()
    assert (done.action, done.phase, case.served()) == ("rollback", "rolled back", case.first)
    assert "the gate refuses it now" in done.reasons[0]


def test_a_canary_behind_an_approval_begins_with_it_and_takes_over_by_it(case: Case, client: MlflowClient) -> None:
    asked = case.publish(approval=True)
    made = config({**CANARY, "hold_seconds": 0})
    decision, begun = canaries.start(case.store, client, case.name, asked, made, None)
    assert gates.waits(decision)
    assert begun is None
    assert case.entries("canary") == []
    yes = Approval(approved=True, by="a person", reason="why not", at="now", of=gates.fingerprint(asked, decision))
    decision, begun = canaries.start(case.store, client, case.name, asked, made, None, approval=yes)
    assert decision.promote
    assert begun is not None
    case.served_by((split(1000, slow=50, step=0),))
    assert case.look().phase == "promoted"
    assert case.served() == asked
    entry = pointer.history(case.store, case.name, "champion")[-1]
    assert "a person" in str(entry.decision)


def test_a_dead_mlflow_keeps_no_bad_candidate_and_promotes_none(case: Case) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = MlflowClient(f"http://127.0.0.1:{closed.getsockname()[1]}")
    case.start()
    case.served_by(GOOD)
    assert canaries.look(case.store, dead, case.name, "champion").action == "step"
    with pytest.raises(SetupError):
        canaries.look(case.store, dead, case.name, "champion")
    assert (case.served(), case.phase()) == (case.first, "running")
    case.served_by((GOOD[0], split(40, errors=40)))
    assert canaries.look(case.store, dead, case.name, "champion").action == "rollback"
    assert case.phase() == "rolled back"


def test_clocks_that_differ_move_no_step(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store's clock counts: what the machine of a look believes is not asked."""
    case.start(config({**CANARY, "hold_seconds": 3600}, max_step_seconds=1e7))
    case.served_by((split(1000, slow=50, step=0),))

    class Ahead:
        @staticmethod
        def now(zone: Any) -> Any:
            from datetime import datetime, timedelta

            return datetime.now(zone) + timedelta(days=3)

    monkeypatch.setattr(canaries, "datetime", Ahead)
    assert case.look().action == "wait"
    assert "of 3600 seconds" in case.look().reasons[0]


def test_hostile_tallies_and_states_stop_nothing_but_themselves(case: Case, client: MlflowClient) -> None:
    begun = case.start()
    case.served_by((shadowed(400, 2.0),))
    case.store.put(keys.tally(case.name, begun.state.id, "f" * 32), b'{"steps": "all"}')
    assert "tally ffffffffffff" in case.look().reasons[0]
    pointer.append(case.store, case.name, "canary", case.second, "canary: step 9", {"canary": {"step": "nine"}})
    assert list(canaries.running(case.store)) == [(case.name, "champion")]
    with pytest.raises(CorruptionError):
        case.look()
    assert case.served() == case.first


def test_an_abort_needs_the_store_alone_and_tallies_of_old_canaries_go(case: Case) -> None:
    begun = case.start()
    case.served_by((shadowed(5),))
    ended = log.abort(case.store, case.name, begun, "we changed our minds")
    assert ended.state.phase == "aborted"
    assert "we changed our minds" in ended.state.reasons[0]
    assert len(list(case.store.list(keys.tallies(case.name)))) == 1
    case.start()
    assert not list(case.store.list(keys.tallies(case.name)))


def test_the_alias_of_canaries_is_not_for_clicks(case: Case) -> None:
    begun = case.start()
    third = case.publish()
    case.click(third, "canary")
    found = reconcile.settle(case.store, case.client, case.name, "canary")
    assert found.action == "undone"
    assert "--canary" in found.why
    assert case.named("canary") == case.second
    assert log.current(case.store, case.name, "champion") == begun


def test_another_alias_has_canaries_of_its_own(case: Case, client: MlflowClient) -> None:
    eu = case.publish(alias="eu")
    assert promotion.promote(case.store, client, case.name, eu, None).promote
    other = case.publish(alias="eu")
    decision, begun = canaries.start(case.store, client, case.name, other, CONFIG, None)
    assert decision.promote
    assert begun is not None
    case.start()
    assert sorted(canaries.running(case.store)) == [(case.name, "champion"), (case.name, "eu")]
    assert case.served("canary-eu") == other
    assert case.served("canary") == case.second


def test_a_name_without_canaries_has_none(case: Case, client: MlflowClient) -> None:
    assert canaries.look(case.store, client, case.name, "champion") is None
    with pytest.raises(NotFoundError):
        canaries.start(case.store, client, case.name, "0" * 64, CONFIG, None)
    assert list(canaries.running(case.store, "nobody")) == []


def test_an_alias_of_that_name_that_somebody_uses_is_left_alone(case: Case) -> None:
    pointer.append(case.store, case.name, "canary", case.first, "promote")
    with pytest.raises(ConfigError, match="for something else"):
        case.start()
    assert case.entries("canary") == ["promote"]
