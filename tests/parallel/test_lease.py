"""What a rank makes of a run's words: silence by its own clock, and no conclusion from a store that does not answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelpress.errors import StoreUnavailableError
from modelpress.parallel import lease
from modelpress.parallel.lease import Beat, Watch, waiting
from modelpress.store.local import LocalStore


class Shaky(LocalStore):
    """A store that may be down."""

    down = False

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        if self.down:
            raise StoreUnavailableError(f"reading {key}", found="no answer")
        return super().get(key, start, length)


class Clock:
    """Seconds, as they are set."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shaky:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.0)
    return Shaky(tmp_path)


def test_a_run_is_gone_after_its_silence_and_not_before(store: Shaky) -> None:
    clock, beat = Clock(), Beat(store)
    watch, other = Watch(store, 10.0, clock), Watch(store, 10.0, clock)
    for _ in range(5):
        clock.now += 9.0
        beat()
        assert watch.gone() is None
    clock.now += 9.5
    assert watch.gone() is None
    assert store.info(lease.GONE) is None
    clock.now += 0.5
    assert watch.gone() == "the run that waited for it has said nothing for 10 s"
    assert other.gone() == watch.gone(), "told by the first that found it out"


def test_a_run_that_never_spoke_is_gone_too(store: Shaky) -> None:
    clock = Clock()
    watch = Watch(store, 10.0, clock)
    assert watch.gone() is None
    clock.now += 10.0
    assert watch.gone() is not None


def test_a_store_that_does_not_answer_says_nothing_of_the_run(store: Shaky) -> None:
    clock, beat = Clock(), Beat(store)
    watch = Watch(store, 10.0, clock)
    beat()
    assert watch.gone() is None
    store.down = True
    for _ in range(5):
        clock.now += 9.0
        assert watch.gone() is None
    store.down = False
    clock.now += 9.0
    assert watch.gone() is None, "the run could not speak either"
    clock.now += 1.0
    assert watch.gone() is not None


def test_who_leaves_without_a_result_says_so_and_who_comes_again_takes_it_back(store: Shaky) -> None:
    watch = Watch(store, 10.0)
    with pytest.raises(KeyboardInterrupt), waiting(store):
        raise KeyboardInterrupt
    assert watch.gone() == "the run that waited for it was cancelled, or failed"
    with waiting(store):
        assert watch.gone() is None
    assert watch.gone() is None, "it has its result"


def test_words_are_said_now_and_again(store: Shaky, monkeypatch: pytest.MonkeyPatch) -> None:
    beat = Beat(store)
    beat()
    first = store.get(lease.BEAT)
    beat()
    assert store.get(lease.BEAT) != first
    monkeypatch.setattr(lease, "BEAT_SECONDS", 1e6)
    last = store.get(lease.BEAT)
    beat()
    assert store.get(lease.BEAT) == last
