"""Canaries on a server: shares, mirrors, what is counted, when it stops by itself; on real packs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from modelpress import keys, pointer
from modelpress.canary import tally
from modelpress.errors import AccessDeniedError, StoreUnavailableError
from modelpress.store import Store
from serving import canary as serving_canary
from serving import counting, mirror
from serving.canary_metrics import CanaryMetrics
from serving.mirror import Mirror, Mirrored
from serving.protocol import encode_request
from serving.refusals import BusyError, NotReadyError, RequestError
from tests.canary.states import config, state
from tests.serving.canaries import HALF, INFER, SHADOW, Call, ask, place, seeded, until
from tests.serving.conftest import CLASSES, WIDTH, lookup_model, scale_model

__all__ = ["place", "seeded"]

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.usefixtures("seeded")
async def test_a_share_of_the_requests_is_answered_by_the_candidate_and_says_so(place: Call) -> None:
    one = place()
    one.begin({"mode": "canary", "share": 0.2}, HALF)
    async with one.client() as client:
        first = await ask(client, 300)
        assert set(first) == {(one.first, 2.0), (one.second, 3.0)}, "each answer is of one pack, the one it names"
        assert 30 <= sum(pack == one.second for pack, _ in first) <= 90
        one.step()
        second = await ask(client, 100)
        assert 30 <= sum(pack == one.second for pack, _ in second) <= 70
        seen = one.seen()
        counted = [(seen.of(step).champion.requests, seen.of(step).candidate.requests) for step in (0, 1)]
        asked = [
            sum(pack == which for pack, _ in found) for found in (first, second) for which in (one.first, one.second)
        ]
        assert [count for pair in counted for count in pair] == asked
        shown = (await client.get("/v2/models/scale")).json()["parameters"]["canary"]
        assert (shown["candidate"], shown["step"], shown["steps"], shown["share"]) == (one.second, 2, 2, 0.5)
        assert seen.of(1).candidate.timed + seen.of(0).candidate.timed > 0, "what is slow was learnt from the champion"
        one.end("rolled back", one.first)
        assert set(await ask(client, 20)) == {(one.first, 2.0)}
        assert "canary" not in (await client.get("/v2/models/scale")).json()["parameters"]
        assert not one.repository.model("scale").held


async def test_a_key_gets_always_the_same_model_and_keeps_it_as_the_share_grows(place: Call) -> None:
    one = place()
    one.begin({"mode": "canary", "share": 0.3}, {"mode": "canary", "share": 0.7})
    async with one.client() as client:
        before = {key: set(await ask(client, 3, key)) for key in map(str, range(20))}
        assert all(len(found) == 1 for found in before.values())
        one.step()
        after = {key: set(await ask(client, 1, key)) for key in before}
        moved = [key for key in before if before[key] != after[key]]
        assert moved
        assert all(after[key] == {(one.second, 3.0)} for key in moved)


async def test_who_asks_for_a_version_gets_it_and_is_not_counted(place: Call) -> None:
    one = place()
    one.begin(HALF)
    body = encode_request({"x": np.ones((1, WIDTH), np.float32)})
    async with one.client() as client:
        for pack in (one.first, one.second):
            for _ in range(5):
                answer = await client.post(f"/v2/models/scale/versions/{pack}/infer", content=body)
                assert answer.json()["model_version"] == pack
    assert one.seen().of(0).champion.requests == one.seen().of(0).candidate.requests == 0


async def test_a_shadow_is_compared_and_never_returned(place: Call) -> None:
    one = place()
    one.begin(SHADOW, compare="values", max_disagreement=0.9)
    async with one.client() as client:
        assert set(await ask(client, 30)) == {(one.first, 2.0)}
        await until(lambda: one.seen().of(0).mirrored == 30)
    assert one.seen().of(0).disagreement == 30.0
    assert one.seen().of(0).candidate.requests == 0


async def test_a_shadow_that_agrees_is_counted_as_such(place: Call) -> None:
    one = place()
    one.begin(SHADOW, compare="argmax")  # all classes score the same with both: the first is the largest
    async with one.client() as client:
        await ask(client, 10)
        await until(lambda: one.seen().of(0).mirrored == 10)
    assert one.seen().of(0).disagreement == 0.0


async def test_a_server_stops_a_candidate_that_disagrees_by_itself_and_tells(place: Call) -> None:
    one = place()
    one.begin(SHADOW, HALF, compare="values")
    async with one.client() as client:
        await ask(client, 20)
        await until(lambda: one.canaries.shown("scale").get("stopped") is not None)
        assert "disagreement: alarm" in (await client.get("/v2/models/scale")).json()["parameters"]["canary"]["stopped"]
    one.canaries.poll()
    (stopped,) = one.seen().stopped
    assert "disagreement: alarm" in stopped
    one.step()
    async with one.client() as client:
        assert set(await ask(client, 20)) == {(one.first, 2.0)}, "no later step sends it anything here"


@pytest.mark.usefixtures("seeded")
async def test_a_candidate_that_fails_is_made_up_for_and_stopped(place: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    one = place()
    one.begin(HALF)
    failed = []

    def fail(*_: Any) -> None:
        failed.append(1)
        raise NotReadyError("running the model", found="too little memory")

    candidate = one.repository.model("scale").held[one.second].engine
    monkeypatch.setattr(candidate, "infer", fail)
    async with one.client() as client:
        assert set(await ask(client, 120)) == {(one.first, 2.0)}
    assert 5 < len(failed) < 40, "stopped long before half of the requests"
    assert "errors: alarm" in one.canaries.shown("scale")["stopped"]
    assert one.seen().of(0).candidate.errors == len(failed)


@pytest.mark.usefixtures("seeded")
async def test_a_slow_candidate_is_stopped(place: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is the test's own: each run of the candidate takes a second of it, one of the champion a hundredth."""
    one = place()
    one.begin(HALF)
    clock = [0.0]
    monkeypatch.setattr(serving_canary.time, "perf_counter", lambda: clock[0])
    for pack, seconds in ((one.first, 0.01), (one.second, 1.0)):
        model = one.repository.model("scale")
        engine = (model.loaded if pack == one.first else model.held[pack]).engine
        run = engine.infer

        def timed(*asked: Any, run: Any = run, seconds: float = seconds) -> Any:
            clock[0] += seconds
            return run(*asked)

        monkeypatch.setattr(engine, "infer", timed)
    async with one.client() as client:
        await ask(client, 2 * counting.CALIBRATION + 300)
    assert "latency: alarm" in one.canaries.shown("scale")["stopped"]
    seen = one.seen().of(0)
    assert seen.candidate.slow == seen.candidate.timed > 0
    assert seen.champion.slow == 0


@pytest.mark.parametrize("error", [RequestError("input"), BusyError("queue")])
async def test_what_both_refuse_counts_for_nobody(
    place: Call, monkeypatch: pytest.MonkeyPatch, error: RequestError
) -> None:
    one = place()
    one.begin(HALF)

    def refuse(*_: Any) -> None:
        raise error

    model = one.repository.model("scale")
    for loaded in (model.loaded, model.held[one.second]):
        monkeypatch.setattr(loaded.engine, "infer", refuse)
    body = encode_request({"x": np.ones((1, WIDTH), np.float32)})
    async with one.client() as client:
        answers = {(await client.post(INFER, content=body)).status_code for _ in range(40)}
    assert answers == {error.status}
    assert one.canaries.shown("scale").get("stopped") is None
    assert one.seen().of(0).ran == 0


async def test_nan_for_an_answer_is_an_error_of_the_candidate(place: Call) -> None:
    one = place(second=scale_model(1e36))  # finite at the warm-up's ones, infinite at larger inputs
    one.begin(HALF)
    body = encode_request({"x": np.full((1, WIDTH), 100.0, np.float32)})
    async with one.client() as client:
        for _ in range(60):
            answer = await client.post(INFER, content=body)
            assert (answer.status_code, answer.json()["model_version"]) == (200, one.first)
    assert "errors: alarm" in one.canaries.shown("scale")["stopped"]


async def test_a_candidate_that_takes_other_tensors_is_never_asked(place: Call) -> None:
    one = place(second=lookup_model())
    one.begin(HALF)
    async with one.client() as client:
        assert set(await ask(client, 20)) == {(one.first, 2.0)}
    assert serving_canary.TAKES_OTHERS in one.seen().stopped[0]


async def test_a_candidate_that_can_not_be_loaded_is_told(place: Call, store: Store) -> None:
    from modelpress import load

    one = place()
    key = keys.blob(load.load_manifest(store, "scale", one.second).shards[0].sha256)
    store.put(key, store.get(key)[:-1] + b"\xff")
    one.begin(HALF)
    assert "can't be loaded here (CorruptionError)" in one.seen().stopped[0]
    async with one.client() as client:
        assert set(await ask(client, 10)) == {(one.first, 2.0)}


async def test_the_promoted_candidate_goes_on_without_being_loaded_again(place: Call, store: Store) -> None:
    one = place()
    one.begin(HALF)
    engine = one.repository.model("scale").held[one.second].engine
    pointer.append(store, "scale", "champion", one.second, "canary")
    one.end("promoted", one.second)
    one.repository.poll()
    one.canaries.poll()
    model = one.repository.model("scale")
    assert model.loaded.engine is engine
    assert not model.held
    async with one.client() as client:
        assert set(await ask(client, 10)) == {(one.second, 3.0)}


async def test_a_champion_that_moved_ends_the_trial_here(place: Call, store: Store, press: Call) -> None:
    one = place()
    one.begin(HALF)
    third = press(scale_model(4.0))
    one.repository.poll()
    async with one.client() as client:
        assert set(await ask(client, 20)) == {(third, 4.0)}


async def test_a_server_that_may_not_tell_sends_nothing(
    place: Call, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = place()
    put = type(store).put

    def refuse(self: Store, key: str, *args: Any, **kwargs: Any) -> bool:
        if key.startswith(keys.CANARIES):
            raise AccessDeniedError(f"storing {key}")
        return bool(put(self, key, *args, **kwargs))

    monkeypatch.setattr(type(store), "put", refuse)
    one.begin(HALF)
    async with one.client() as client:
        assert set(await ask(client, 20)) == {(one.first, 2.0)}
    assert "may not write" in one.canaries.shown("scale")["stopped"]


@pytest.mark.parametrize("broken", ["list", "put"])
async def test_a_store_that_is_gone_pauses_the_canary_until_it_is_back(
    place: Call, store: Store, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    one = place()
    one.begin({"mode": "canary", "share": 0.9})
    now = [0.0]
    real = serving_canary.time.monotonic()
    monkeypatch.setattr(serving_canary.time, "monotonic", lambda: real + now[0])

    def gone(*_: Any, **__: Any) -> Iterator[Any]:
        raise StoreUnavailableError("asking the store")

    async with one.client() as client:
        assert (one.second, 3.0) in await ask(client, 30)
        with monkeypatch.context() as patch:
            patch.setattr(type(store), broken, gone)
            now[0] = serving_canary.SILENT_SECONDS + 1
            one.canaries.poll()
            assert set(await ask(client, 30)) == {(one.first, 2.0)}
        one.canaries.poll()
        assert (one.second, 3.0) in await ask(client, 30)


async def test_a_hostile_state_sends_nobody_anywhere(place: Call, store: Store) -> None:
    one = place()
    good = state(0, config(HALF), candidate=one.second, champion=one.first).model_dump(mode="json")
    pointer.append(store, "scale", "canary", one.second, "canary", {"canary": {**good, "config": {"steps": 7}}})
    one.canaries.poll()
    assert one.canaries.shown("scale") is None
    async with one.client() as client:
        assert set(await ask(client, 10)) == {(one.first, 2.0)}


def test_a_tally_is_written_now_and_then_and_at_once_when_a_server_stops(
    place: Call, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = place()
    one.begin(HALF)
    now = [serving_canary.time.monotonic()]
    monkeypatch.setattr(serving_canary.time, "monotonic", lambda: now[0])
    trial = one.canaries._trials["scale"]
    one.canaries.poll()

    def written() -> int:
        return tally.read(store, "scale", "1" * 32).of(0).champion.requests

    for expected, later in ((0, 0.0), (0, 1.0), (3, serving_canary.REPORT_SECONDS)):
        trial.answered(0, candidate=False, seconds=0.1)
        now[0] += later
        one.canaries.poll()
        assert written() == expected
    trial.answered(0, candidate=False, seconds=0.1)
    trial.stop("the test")
    one.canaries.poll()
    assert written() == 4
    assert "the test" in tally.read(store, "scale", "1" * 32).stopped[0]


def test_a_full_mirror_drops_and_never_waits(place: Call) -> None:
    one = place()
    engine = one.repository.model("scale").loaded.engine
    waiting = Mirror()  # nobody works it off
    x = {"x": np.ones((1, WIDTH), np.float32)}
    small = Mirrored(engine, x, {"y": np.ones((1, CLASSES), np.float32)}, "argmax", 0.1, lambda _: None)
    assert [waiting.offer(small) for _ in range(mirror.MAX_WAITING + 3)] == [True] * mirror.MAX_WAITING + [False] * 3
    large = {"x": np.ones(mirror.MAX_WAITING_BYTES // 4 + 1, np.float32)}
    assert not Mirror().offer(Mirrored(engine, large, {}, "argmax", 0.1, lambda _: None))


@pytest.mark.usefixtures("seeded")
async def test_prometheus_is_told_what_is_counted(place: Call) -> None:
    one = place()
    registry = CollectorRegistry()
    registry.register(CanaryMetrics(one.canaries))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"modelpress_canary_{name}", {"model": "scale", **labels})

    assert value("step") is None
    one.begin(HALF, SHADOW)
    async with one.client() as client:
        asked = await ask(client, 40)
        assert value("share", mode="canary") == 0.5
        for arm, pack in (("champion", one.first), ("candidate", one.second)):
            counted = [value("requests_total", arm=arm, outcome=outcome) for outcome in ("error", "slow", "other")]
            assert counted == [0.0, 0.0, sum(which == pack for which, _ in asked)]
        one.step()
        await ask(client, 5)
        await until(lambda: value("mirrored_total") == 5.0)
    assert (value("step"), value("stopped"), value("dropped_total")) == (2.0, 0.0, 0.0)
    next(iter(one.canaries.trials())).stop("the test")
    assert value("stopped") == 1.0
