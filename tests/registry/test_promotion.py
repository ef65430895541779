"""Aliases in the store and in MLflow: what a retry, a dead server and a refusing store leave behind."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from modelpress import decisions, pointer, scores
from modelpress.config import GateConfig
from modelpress.errors import AccessDeniedError, CorruptionError, SetupError, StoreUnavailableError
from modelpress.reports import EvaluationReport, LatencyReport, Override, QualityReport
from modelpress.scores import Scored
from modelpress.settings import Settings
from modelpress.store import Store
from modelpress.store.local import LocalStore
from registry import figures, promotion, runs, versions
from tests.conftest import OpenS3
from tests.databases import Databases
from tests.packs import make_pack, torch_checkpoint

NAME = "demo"
GATE = GateConfig(min_compression_ratio=0, margin=0.3)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, databases: Databases) -> MlflowClient:
    folder = tmp_path_factory.mktemp("mlflow")
    return runs.open_client(Settings(home=folder, tracking_uri=databases.mlflow(folder)))


@pytest.fixture
def dead() -> Iterator[MlflowClient]:
    """A client of an MLflow server that is down."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        yield MlflowClient(f"http://127.0.0.1:{closed.getsockname()[1]}")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return LocalStore(tmp_path / "store")


def publish(store: Store, client: MlflowClient, folder: Path, seed: int, samples: str = "the same") -> str:
    """A registered pack that passes `GATE` where the champion was scored on the same samples."""
    checkpoint = torch_checkpoint(seed)
    equal = {who: Scored(np.ones(50), samples, "accuracy") for who in ("candidate", "source")}
    file = {scores.SCORES_FILE: scores.dump(equal)}
    pack = make_pack(folder / str(seed), replace(checkpoint, files=checkpoint.files | file))
    pack.publish(store)
    register(client, pack.digest)
    return pack.digest


def register(client: MlflowClient, pack: str, **measured: str) -> tuple[versions.Version, bool]:
    experiment = client.get_experiment_by_name(NAME)
    identity = experiment.experiment_id if experiment else client.create_experiment(NAME)
    run = client.create_run(identity).info.run_id
    return versions.register(
        client,
        NAME,
        pack=pack,
        uri=f"/store/{pack}",
        run_id=run,
        tags={"flow_run_id": run},
        measured=measured,
        description="",
        log=lambda: client.create_logged_model(identity, name=NAME, source_run_id=run),
    )


def named(client: MlflowClient, alias: str = "champion") -> str | None:
    found = versions.by_alias(client, NAME, alias)
    return found.pack if found else None


@pytest.fixture
def packs(store: Store, client: MlflowClient, tmp_path: Path) -> list[str]:
    """Three that were champion one after the other; the last stands."""
    found = [publish(store, client, tmp_path, seed) for seed in range(3)]
    for pack in found:
        decision = promotion.promote(store, client, NAME, pack, GATE)
        assert decision.promote, decision.line()
    return found


def test_a_rollback_whose_mlflow_is_dead_has_moved_and_its_retry_goes_no_further(
    packs: list[str], store: Store, client: MlflowClient, dead: MlflowClient
) -> None:
    started = time.monotonic()
    for _ in range(2):
        done = promotion.rollback(store, dead, NAME, "champion", token="flow-run-1")
        assert done.pack == packs[1]
        assert done.lag is not None
        assert f"`modelpress rollback {NAME} --alias champion --to {packs[1]}` to mend" in done.lag
    assert time.monotonic() - started < 20
    assert named(client) == packs[2]
    entries = len(pointer.history(store, NAME, "champion"))
    assert promotion.rollback(store, client, NAME, "champion", packs[1]).lag is None  # the advice, taken
    assert named(client) == packs[1]
    assert len(pointer.history(store, NAME, "champion")) == entries
    assert promotion.rollback(store, client, NAME, "champion", token="flow-run-2").pack == packs[0]


def test_a_dead_mlflow_stops_a_promotion_before_anything_moves(
    packs: list[str], store: Store, dead: MlflowClient
) -> None:
    with pytest.raises(SetupError, match="MODELPRESS_TRACKING_URI") as found:
        promotion.promote(store, dead, NAME, packs[0], GATE)
    assert dead.tracking_uri in str(found.value)
    with pytest.raises(SetupError) as found:
        runs.check_server(dead.tracking_uri.replace("http://", "http://user:secret@"))
    assert "secret" not in str(found.value)
    assert len(pointer.history(store, NAME, "champion")) == 3


class Failing(LocalStore):
    """Goes away at the moment of the pointer's write; `deaf` also for reading."""

    deaf = False
    gone = False

    def put(self, key: str, data: bytes | Path, *, if_absent: bool = False, sha256: str | None = None) -> bool:
        if "/refs/" in key:
            self.gone = True
            raise StoreUnavailableError(f"storing {key}")
        return super().put(key, data, if_absent=if_absent, sha256=sha256)

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        if self.gone and self.deaf:
            raise StoreUnavailableError(f"reading {key}")
        return super().get(key, start, length)


@pytest.mark.parametrize("deaf", [False, True])
def test_mlflow_is_set_back_when_the_store_goes_away(
    packs: list[str], store: LocalStore, client: MlflowClient, deaf: bool
) -> None:
    failing = Failing(store.folder)
    failing.deaf = deaf
    with pytest.raises(StoreUnavailableError, match="storing"):
        promotion.promote(failing, client, NAME, packs[0], GATE)
    assert named(client) == packs[2]
    assert named(client, "challenger") == packs[0]


def test_a_first_promotion_that_fails_leaves_no_alias(store: LocalStore, client: MlflowClient, tmp_path: Path) -> None:
    pack = publish(store, client, tmp_path, 7)
    gate = GATE.model_copy(update={"alias": "first"})
    with pytest.raises(StoreUnavailableError):
        promotion.promote(Failing(store.folder), client, NAME, pack, gate)
    assert named(client, "first") is None


@pytest.mark.s3
def test_a_key_that_may_only_read_promotes_nothing(open_s3: OpenS3, client: MlflowClient, tmp_path: Path) -> None:
    writer = open_s3("writer")
    first, second = (publish(writer, client, tmp_path, seed) for seed in (0, 1))
    assert promotion.promote(writer, client, NAME, first, GATE).promote
    with pytest.raises(AccessDeniedError):
        promotion.promote(open_s3("reader"), client, NAME, second, GATE)
    assert named(client) == first


def test_the_pointer_and_not_mlflow_says_who_is_champion(packs: list[str], store: Store, client: MlflowClient) -> None:
    ahead = versions.find(client, NAME, packs[0])
    assert ahead is not None
    versions.set_alias(client, ahead, "champion")
    assert versions.resolve(client, store, NAME, "champion") == packs[2]
    versions.set_alias(client, ahead, "candidate")
    assert versions.resolve(client, store, NAME, "candidate") == packs[0]
    assert versions.resolve(client, store, NAME, ahead.number) == packs[0]


def test_the_way_out_of_a_champion_that_was_scored_on_other_samples(
    packs: list[str], store: Store, client: MlflowClient, tmp_path: Path
) -> None:
    candidate, champion = (publish(store, client, tmp_path, seed, "new ones") for seed in (8, 9))
    decision = promotion.promote(store, client, NAME, candidate, GATE)
    assert decision.verdict == "inconclusive"
    assert "`modelpress rollback NAME --to DIGEST`, then promote this one again" in decision.line()
    assert promotion.rollback(store, client, NAME, "champion", champion).pack == champion
    assert promotion.promote(store, client, NAME, candidate, GATE).promote
    assert named(client) == candidate


def test_registering_again_brings_the_numbers_up_to_date_and_keeps_the_origin(client: MlflowClient) -> None:
    first, made = register(client, "a" * 64, speedup="9.0", accuracy="0.9")
    assert made
    again, made = register(client, "a" * 64, speedup="1.5")
    assert (again.number, made) == (first.number, False)
    stored = versions.by_number(client, NAME, first.number)
    assert stored.tags == again.tags
    assert {**first.tags, "speedup": "1.5"} == stored.tags
    assert versions.measured_number(stored, "speedup") == 1.5
    assert versions.measured_number(stored, "unmeasured") is None


HARD = GATE.model_copy(update={"min_compression_ratio": 100_000.0})
BECAUSE = Override(by="Anna", reason="the champion leaks")


def test_each_judgement_is_kept_beside_the_pack_it_is_of(packs: list[str], store: Store, client: MlflowClient) -> None:
    refused = promotion.promote(store, client, NAME, packs[0], HARD)
    kept = [one.record for one in decisions.kept(store, NAME, packs[0]).found]
    assert [record.decision.promote for record in kept if record] == [False, True]
    last = kept[0]
    assert last is not None
    assert (last.decision, last.champion, last.after, last.alias) == (refused, packs[2], 3, "champion")
    assert last.gate["min_compression_ratio"] == 100_000
    version = versions.carrying(client, NAME, packs[0])
    assert version.tags["gate.decision"] == last.digest
    for number, entry in enumerate(pointer.history(store, NAME, "champion")):
        assert entry.decision is not None
        record = decisions.read(store, NAME, entry.pack, entry.decision[decisions.RECORD])
        assert (record.pack, record.after, record.decision.promote) == (packs[number], number, True)


def test_judging_alone_keeps_the_decision_and_moves_nothing(
    packs: list[str], store: Store, client: MlflowClient
) -> None:
    before = pointer.history(store, NAME, "champion")
    decision = promotion.promote(store, client, NAME, packs[0], GATE, move=False)
    assert decision.promote
    assert pointer.history(store, NAME, "champion") == before
    assert named(client) == packs[2]
    newest = decisions.kept(store, NAME, packs[0]).found[0].record
    assert newest is not None
    assert (newest.decision, newest.champion, newest.after) == (decision, packs[2], len(before))


def test_an_override_moves_the_alias_with_its_name_on_it_and_a_later_judgement_takes_the_name_off(
    packs: list[str], store: Store, client: MlflowClient
) -> None:
    decision = promotion.promote(store, client, NAME, packs[0], HARD, override=BECAUSE)
    assert (decision.promote, decision.verdict, decision.override) == (True, "fail", BECAUSE)
    entry = pointer.current(store, NAME, "champion")
    assert entry is not None
    assert (entry.pack, entry.reason) == (packs[0], "override")
    assert named(client) == packs[0]
    assert versions.carrying(client, NAME, packs[0]).tags["gate.override"] == BECAUSE.line()
    assert promotion.promote(store, client, NAME, packs[0], GATE, override=BECAUSE).override is None
    tags = versions.carrying(client, NAME, packs[0]).tags
    assert "gate.override" not in tags
    assert tags["gate.verdict"] == "pass"


def test_no_override_promotes_damaged_bytes(packs: list[str], store: Store, client: MlflowClient) -> None:
    from modelpress import keys, load

    before = len(decisions.kept(store, NAME).found)
    key = keys.blob(load.load_manifest(store, NAME, packs[0]).shards[0].sha256)
    data = store.get(key)
    store.put(key, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptionError):
        promotion.promote(store, client, NAME, packs[0], HARD, override=BECAUSE)
    assert named(client) == packs[2]
    assert len(decisions.kept(store, NAME).found) == before


@pytest.mark.parametrize("hardware", [None, "c7i.2xlarge"])
def test_figures_count_for_the_class_that_measured_them(
    packs: list[str], store: Store, client: MlflowClient, hardware: str | None
) -> None:
    quality = QualityReport(metric="accuracy", samples=1, value=1, low=0, high=1)
    rows = [(1, 0.002, 400.0), (32, 0.020, 900.0)]
    report = EvaluationReport(
        stage="quantize",
        runtime="onnxruntime",
        provider="CPUExecutionProvider",
        hardware=hardware,
        quality=quality,
        size_bytes=1,
        latency=[
            LatencyReport(batch_size=size, calls=9, p50_seconds=p99 / 2, p99_seconds=p99, throughput_per_second=rate)
            for size, p99, rate in rows
        ],
    )
    version = versions.carrying(client, NAME, packs[1])
    versions.annotate(client, version, figures.tags(report))
    asked = {"hardware": "c7i.2xlarge", "max_p99_seconds": 0.002, "min_throughput_per_second": 900.0}
    gate = GateConfig.model_validate(GATE.model_dump() | asked | {"provider": "CPUExecutionProvider"})
    decision = promotion.promote(store, client, NAME, packs[1], gate)
    assert decision.verdict == ("pass" if hardware else "inconclusive"), decision.line()
    if hardware:
        assert named(client) == packs[1]
        slower = gate.model_copy(update={"max_p99_seconds": 0.0019})
        assert "p99: fail, 2.000 ms on c7i.2xlarge" in promotion.promote(store, client, NAME, packs[1], slower).line()


def test_a_tag_that_is_no_number_is_an_error_with_the_way_out(
    packs: list[str], store: Store, client: MlflowClient
) -> None:
    version = versions.find(client, NAME, packs[0])
    assert version is not None
    versions.annotate(client, version, {"speedup": "fast"})
    with pytest.raises(CorruptionError, match=r"(?s)tag 'speedup' of version .*'fast'.*run the optimize flow again"):
        promotion.promote(store, client, NAME, packs[0], GATE.model_copy(update={"min_speedup": 1.0}))
    assert named(client) == packs[2]
