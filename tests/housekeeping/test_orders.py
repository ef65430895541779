"""Every order of the steps of publishers and collectors.

The real code runs in threads, over a store in memory that lets one call of one thread through at a time; between any
two steps a long time may pass, once. All orders are tried, depth first (where time passes: those with few switches);
two in which every thread got the same answers, and which left the same objects, are one. What the protocol supposes is
spelled here as well: no time passes between a delete (or a commit) that was begun and its effect.

Breaking the protocol, in each of the ways that are listed at the end, is found out: so far can these tests be trusted.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest

from modelpress import keys, pointer
from modelpress import publish as publishing
from modelpress.config import RetentionConfig
from modelpress.errors import ConflictError, NotFoundError
from modelpress.housekeeping import collect, intents, retention, survey, turns
from modelpress.store import ObjectInfo
from tests.housekeeping.small import START, MemoryStore, SmallPack, broken

Work = Callable[["Stepped"], object]
OLD, NEW = SmallPack([b"shared", b"old"]), SmallPack([b"shared", b"new"])
TIME = "time"
HOUR, WEEKS = timedelta(hours=1), timedelta(days=15)
ATOMIC = ("delete blobs/", "put packs/", "delete packs/", "delete uploads/")
"""Between the decision for one of these and its effect no time passes: what `turns` has its margins for."""
FEW, MANY = 1, 10**6
"""Switches from a thread that could have gone on."""
ALONE = ("stages/", "doctor/")
"""What only one thread looks at: no step of its own."""


TIMED = (keys.UPLOADS, keys.COLLECTIONS)
"""Whose times decide something."""


class HaltedError(BaseException):
    """This run is over."""


class Stepped(MemoryStore):
    """A store whose calls wait for leave, one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = threading.Condition()
        self.allowed = ""
        self.waiting: dict[str, str] = {}
        self.answers: dict[str, list[object]] = {}
        self.over = False
        self.version = 0

    def step(self, what: str, key: str, call: Callable[[], Any]) -> Any:
        me = threading.current_thread().name
        if me not in self.answers or key.startswith(ALONE):
            return call()
        with self.turn:
            self.waiting[me] = f"{what} {key}"
            self.turn.notify_all()
            self.turn.wait_for(lambda: self.allowed == me or self.over)
            if self.over:
                raise HaltedError
            self.allowed = ""
            before = set(self.objects)
            answer = call()
            self.version += before != set(self.objects) or what == "put"
            seen = [info.key for info in answer] if what == "list" else answer is None or answer is True
            timed = key.startswith(TIMED)
            self.answers[me].append((what, key, str(seen), self.time if timed and what == "put" else None))
            del self.waiting[me]
            return answer

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        return bytes(self.step("get", key, lambda: MemoryStore.get(self, key, start, length)))

    def put(self, key: str, data: Any, *, if_absent: bool = False, sha256: str | None = None) -> bool:
        return bool(self.step("put", key, lambda: MemoryStore.put(self, key, data, if_absent=if_absent, sha256=sha256)))

    def info(self, key: str) -> ObjectInfo | None:
        found: ObjectInfo | None = self.step("info", key, lambda: MemoryStore.info(self, key))
        return found

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return iter(self.step("list", prefix, lambda: tuple(MemoryStore.list(self, prefix))))

    def delete(self, key: str) -> None:
        self.step("delete", key, lambda: MemoryStore.delete(self, key))

    def sleep(self, seconds: float) -> None:
        """Wait until another did something, or until nobody else can."""
        self.step("sleep", str(self.version), lambda: None)

    # --- what the scheduler sees

    def choices(self) -> list[str]:
        awake = [n for n, what in self.waiting.items() if what != f"sleep {self.version}"]
        return sorted(awake) or sorted(self.waiting)

    def state(self) -> object:
        told = tuple((name, tuple(map(str, answers))) for name, answers in sorted(self.answers.items()))
        written = sorted((key, time if key.startswith(TIMED) else None) for key, (_, time) in self.objects.items())
        return told, tuple(written), self.time


class _Inline:
    """A pool that works at once: its threads would have no names here."""

    def __init__(self, *_: object) -> None: ...

    def submit(self, work: Callable[..., Any], *items: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*items))
        return done

    def map(self, work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        return [work(item) for item in items]

    def shutdown(self, **_: object) -> None: ...


@pytest.fixture(autouse=True)
def stepwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (collect, publishing):
        monkeypatch.setattr(module, "DaemonPool", _Inline)
    counts: dict[str, int] = {}

    def name() -> uuid.UUID:
        me = threading.current_thread()
        count = counts[me.name] = (0 if getattr(me, "fresh", False) else counts.get(me.name, 0)) + 1
        me.fresh = False  # type: ignore[attr-defined]
        return uuid.UUID(int=sum(map(ord, me.name)) * 1000 + count)

    monkeypatch.setattr(uuid, "uuid4", name)


def run(
    make: Callable[[], Stepped],
    works: dict[str, Work],
    jump: timedelta,
    switches: int,
    prefix: tuple[str, ...],
    seen: set[object],
) -> tuple[list[tuple[str, ...]], Stepped | None, dict[str, BaseException]]:
    """Run with these first choices, then with the first possible ones. The choices not made; the store, None where it
    came to a state that was seen before; and the errors."""
    store, errors, others = make(), dict[str, BaseException](), list[tuple[str, ...]]()

    def body(work: Work) -> None:
        me = threading.current_thread().name
        try:
            work(store)
        except HaltedError:
            pass
        except Exception as error:  # noqa: BLE001  looked at by the test
            errors[me] = error
        finally:
            with store.turn:
                del store.answers[me]
                store.turn.notify_all()

    threads = [threading.Thread(target=body, args=(work,), name=name, daemon=True) for name, work in works.items()]
    store.answers = {name: [] for name in works}
    for thread in threads:
        thread.fresh = True  # type: ignore[attr-defined]
        thread.start()
    made: tuple[str, ...] = ()
    last, left = "", switches
    try:
        while True:
            with store.turn:
                store.turn.wait_for(lambda: not store.allowed and set(store.waiting) >= set(store.answers))
                if not store.waiting:
                    break
                stuck = all(what.startswith("sleep") for what in store.waiting.values())
                choices = store.choices()
                still = any(what.startswith(ATOMIC) for what in store.waiting.values())
                if stuck:  # nobody will do anything more, until time passes
                    store.time += timedelta(minutes=1)
                elif jump and TIME not in made and not still:
                    choices = [*choices, TIME]
                choices.sort(key=lambda name: name != last)  # to go on is no switch
                if len(made) >= len(prefix):
                    state = store.state() if switches == MANY else (store.state(), last, left)
                    if state in seen and not stuck:
                        return others, None, errors
                    seen.add(state)
                    free = last not in choices or left > 0
                    others += [(*made, other) for other in choices[1:] if not stuck and (free or other == TIME)]
                    choice = choices[0]
                else:
                    choice = prefix[len(made)]
                made = (*made, choice)
                assert len(made) < 500, made
                if choice == TIME:
                    store.time += jump
                    continue
                left -= last in choices and choice != last
                last = choice
                store.allowed = choice
                store.turn.notify_all()
        return others, store, errors
    finally:
        with store.turn:
            store.over = True
            store.turn.notify_all()
        for thread in threads:
            thread.join(10)


def all_orders(
    make: Callable[[], Stepped],
    works: dict[str, Work],
    monkeypatch: pytest.MonkeyPatch,
    jump: timedelta = timedelta(0),
    switches: int = MANY,
    most: int = 50_000,
) -> Iterator[tuple[Stepped, dict[str, BaseException]]]:
    current: list[Stepped] = []

    def made() -> Stepped:
        current[:] = [make()]
        return current[0]

    def clock() -> float:
        return ((current[0].time if current else START) - START).total_seconds()

    for module in (turns, intents, collect):
        monkeypatch.setattr(module, "awake", clock)
    monkeypatch.setattr(turns.time, "sleep", lambda seconds: current[0].sleep(seconds))
    todo, seen = [()], set[object]()  # type: ignore[var-annotated]
    for _ in range(most):
        if not todo:
            return
        others, store, errors = run(made, works, jump, switches, todo.pop(), seen)
        todo += others
        if store is not None:
            yield store, errors
    raise AssertionError(f"more than {most} orders")


# --- the scenes


def with_garbage() -> Stepped:
    """A store from which OLD's manifest was removed: its blobs are garbage, unless somebody comes to need them."""
    store = Stepped()
    OLD.publish(store)
    store.delete(keys.manifest("demo", OLD.digest))
    store.later(days=30)
    return store


def with_versions() -> Stepped:
    """Two versions; the older may go."""
    store = Stepped()
    OLD.publish(store)
    store.later(days=10)
    NEW.publish(store)
    store.later(days=60)
    return store


def collecting(store: Stepped) -> None:
    with suppress(ConflictError):
        collect.collect(store, delete=True, grace_seconds=0)


def retaining(store: Stepped) -> None:
    with suppress(ConflictError):
        retention.retain(store, RetentionConfig(keep_versions=1, keep_days=0), delete=True)


def promoting(store: Stepped) -> None:
    pointer.append(store, "demo", "champion", OLD.digest, "promote", token="t")


def check_published(
    scene: Callable[[], Stepped], monkeypatch: pytest.MonkeyPatch, jump: timedelta, **works: Work
) -> int:
    count = 0
    for store, errors in all_orders(scene, works, monkeypatch, jump, FEW if jump else MANY):
        count += 1
        assert not broken(store), broken(store)
        assert not errors, errors
        assert keys.manifest("demo", NEW.digest) in store.objects
    return count


@pytest.mark.parametrize("jump", [timedelta(0), HOUR, WEEKS], ids=["no time", "an hour", "weeks"])
def test_nothing_is_taken_from_a_publisher(monkeypatch: pytest.MonkeyPatch, jump: timedelta) -> None:
    assert check_published(with_garbage, monkeypatch, jump, publisher=NEW.publish, collector=collecting) > 20


@pytest.mark.parametrize(("jump", "switches"), [(timedelta(0), 3), (WEEKS, FEW)], ids=["no time", "weeks"])
def test_a_pointer_never_leads_nowhere(monkeypatch: pytest.MonkeyPatch, jump: timedelta, switches: int) -> None:
    moved = refused = 0
    for store, errors in all_orders(with_versions, {"p": promoting, "r": retaining}, monkeypatch, jump, switches):
        assert not broken(store)
        entry = pointer.current(store, "demo", "champion")
        if entry is None:
            assert isinstance(errors["p"], NotFoundError)
            refused += 1
        else:
            assert not errors
            assert keys.manifest("demo", entry.pack) in store.objects
            moved += 1
    assert moved
    assert refused


# --- the same, with the protocol broken


def _publish_without_intent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intents.Announcement, "_renew", lambda self: setattr(self, "_renewed", intents.awake()))


def _publish_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intents, "pass_by", lambda *_: None)


def _wait_before_announcing(monkeypatch: pytest.MonkeyPatch) -> None:
    def announce(self: intents.Announcement) -> None:
        turns.pass_by(self._store, "")
        self._keys.append(keys.intent("demo", uuid.uuid4().hex))
        self._renew()

    monkeypatch.setattr(intents.Announcement, "announce", announce)


def _read_manifests_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(self: survey.Survey, store: Stepped, now: Any) -> None:
        for info in store.list(keys.PACKS):
            if (owner := keys.manifest_owner(info.key)) is not None:
                self._read(store, survey.PackId(*owner), info)
        self.intents = intents.read_intents(store)
        for found in self.living(now):
            self.needed.update(found.intent.blobs)

    monkeypatch.setattr(survey.Survey, "look", look)


def _look_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector announces one round and deletes in the next, without reading again."""
    monkeypatch.setattr(turns.Lease, "next_round", lambda self: self._begin(self._number + 1))
    look, looked = survey.Survey.look, list[survey.Survey]()

    def first(self: survey.Survey, store: Stepped, now: Any) -> None:
        if self not in looked:
            looked.append(self)
            look(self, store, now)

    monkeypatch.setattr(survey.Survey, "__eq__", lambda a, b: a is b)
    monkeypatch.setattr(survey.Survey, "look", first)


def _delete_after_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns.Lease, "holds", lambda _: True)


def _commit_after_the_intent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intents.Announcement, "holds", lambda _: True)


def _withdraw_before_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = publishing._commit

    def late(store: Stepped, manifest: Any) -> None:
        for key in [key for key in store.objects if key.startswith(keys.UPLOADS)]:
            store.delete(key)
        commit(store, manifest)

    monkeypatch.setattr(publishing, "_commit", late)


@pytest.mark.parametrize(
    ("breaking", "jump"),
    [
        (_publish_without_intent, timedelta(0)),
        (_publish_without_waiting, timedelta(0)),
        (_wait_before_announcing, timedelta(0)),
        (_read_manifests_first, timedelta(0)),
        (_look_once, timedelta(0)),
        (_withdraw_before_the_commit, timedelta(0)),
        (_delete_after_the_lease, HOUR),
        (_commit_after_the_intent, WEEKS),
    ],
)
def test_a_broken_protocol_is_found_out(
    monkeypatch: pytest.MonkeyPatch, breaking: Callable[[pytest.MonkeyPatch], None], jump: timedelta
) -> None:
    breaking(monkeypatch)
    works: dict[str, Work] = {"publisher": NEW.publish, "collector": collecting}
    few = FEW if jump else MANY
    assert any(broken(store) for store, _ in all_orders(with_garbage, works, monkeypatch, jump, few))
