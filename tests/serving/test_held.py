"""Packs beside the champion: held for a canary, released, promoted without being loaded again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from modelpress import keys, load, pointer
from modelpress.errors import ConfigError, CorruptionError, NotFoundError
from modelpress.store import Store
from serving.protocol import NotReadyError, NotServedError
from serving.repository import MAX_HELD
from tests.serving.conftest import scale_model

Call = Callable[..., Any]


def test_a_held_pack_is_found_by_its_digest_alone(press: Call, repository: Call) -> None:
    first, second = press(scale_model(2.0)), press(scale_model(3.0), alias=None)
    models = repository("scale")
    held = models.hold("scale", second)
    model = models.model("scale")
    assert model.answering(second) is held
    assert model.answering(second[:12]) is held
    assert held.pointer is None
    assert model.answering().engine.pack == first
    assert models.hold("scale", second) is held
    models.release("scale", second)
    models.release("scale", second)
    with pytest.raises(NotServedError):
        model.answering(second)


def test_what_is_promoted_is_not_loaded_again_and_what_is_released_goes(
    store: Store, press: Call, repository: Call
) -> None:
    press(scale_model(2.0))
    second = press(scale_model(3.0), alias=None)
    models = repository("scale")
    held = models.hold("scale", second)
    gone = weakref.ref(models.model("scale").answering().engine)
    pointer.append(store, "scale", "champion", second, "promote")
    models.poll()
    model = models.model("scale")
    assert model.answering().engine is held.engine
    assert model.answering().pointer is not None
    assert [row["version"] for row in models.index()] == [second]
    models.release("scale", second)
    assert model.answering(second).engine is held.engine
    gc.collect()
    assert gone() is None


def test_the_champion_itself_may_be_held(press: Call, repository: Call) -> None:
    pack = press(scale_model(2.0))
    models = repository("scale")
    assert models.hold("scale", pack).engine is models.model("scale").answering().engine


def test_a_pack_that_can_not_be_loaded_changes_nothing(store: Store, press: Call, repository: Call) -> None:
    first, second = press(scale_model(2.0)), press(scale_model(3.0), alias=None)
    models = repository("scale")
    key = keys.blob(load.load_manifest(store, "scale", second).shards[0].sha256)
    store.put(key, store.get(key)[:-1] + b"\xff")
    with pytest.raises(CorruptionError):
        models.hold("scale", second)
    with pytest.raises(NotFoundError):
        models.hold("scale", "0" * 64)
    with pytest.raises(ConfigError, match="a digest"):
        models.hold("scale", "champion")
    with pytest.raises(NotServedError):
        models.hold("nobody", first)
    model = models.model("scale")
    assert (dict(model.held), model.answering().engine.pack) == ({}, first)


def test_so_many_and_no_more(press: Call, repository: Call) -> None:
    press(scale_model(2.0))
    packs = [press(scale_model(3.0 + number), alias=None) for number in range(MAX_HELD + 1)]
    models = repository("scale")
    for pack in packs[:-1]:
        models.hold("scale", pack)
    with pytest.raises(ConfigError, match="release one"):
        models.hold("scale", packs[-1])
    models.release("scale", packs[0])
    models.hold("scale", packs[-1])


def test_an_unload_lets_go_of_all(press: Call, repository: Call) -> None:
    press(scale_model(2.0))
    second = press(scale_model(3.0), alias=None)
    models = repository("scale")
    models.hold("scale", second)
    models.unload("scale")
    with pytest.raises(NotReadyError):
        models.model("scale").answering(second)
    assert models.model("scale").held == {}
