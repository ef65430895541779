"""Following a pointer: what swaps, what is kept when something is wrong, what is tried again."""

from __future__ import annotations

import gc
import json
import logging
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from modelpress import keys, load, pointer
from modelpress.errors import ConfigError, CorruptionError, NotFoundError, StoreError
from modelpress.store import Store
from serving.protocol import NotReadyError, NotServedError
from serving.repository import Repository
from tests.serving.conftest import WIDTH, scale_model

Call = Callable[..., Any]


def answer(repository: Repository, name: str = "scale") -> float:
    engine = repository.model(name).answering().engine
    found = engine.infer({"x": np.ones((1, WIDTH), np.float32)}, ["y"])["y"]
    assert (found == found[0, 0]).all()
    return float(found[0, 0]) / WIDTH


def row(repository: Repository, name: str = "scale") -> dict[str, Any]:
    return next(row for row in repository.index() if row["name"] == name)


def shard_key(store: Store, pack: str, name: str = "scale") -> str:
    return keys.blob(load.load_manifest(store, name, pack).shards[0].sha256)


def flip_bit(store: Store, key: str) -> None:
    data = bytearray(store.get(key))
    data[-1] ^= 1
    store.put(key, bytes(data))


def test_a_promotion_and_a_rollback_are_followed(store: Store, press: Call, repository: Call) -> None:
    first = press(scale_model(2.0))
    models = repository("scale")
    assert answer(models) == 2.0
    second = press(scale_model(3.0))
    assert answer(models) == 2.0
    models.poll()
    assert (answer(models), row(models)["version"]) == (3.0, second)
    pointer.rollback(store, "scale", "champion")
    models.poll()
    assert (answer(models), row(models)["version"]) == (2.0, first)
    assert models.model("scale").answering().pointer.number == 3


def test_an_entry_for_the_same_pack_loads_nothing(store: Store, press: Call, repository: Call) -> None:
    pack = press(scale_model(2.0))
    models = repository("scale")
    before = models.model("scale").answering()
    pointer.append(store, "scale", "champion", pack, "promote")
    models.poll()
    after = models.model("scale").answering()
    assert after.engine is before.engine
    assert after.pointer.number == 2


def corrupt(store: Store, pack: str, name: str = "scale") -> None:
    flip_bit(store, shard_key(store, pack, name))


def truncate(store: Store, pack: str) -> None:
    key = shard_key(store, pack)
    store.put(key, store.get(key)[:-1])


def remove(store: Store, pack: str) -> None:
    store.delete(shard_key(store, pack))


def forge_manifest(store: Store, pack: str) -> None:
    flip_bit(store, keys.manifest("scale", pack))


def newer_pointer(store: Store, pack: str) -> None:
    key = keys.pointer("scale", "champion", 2)
    store.put(key, json.dumps(json.loads(store.get(key)) | {"format_version": 99}).encode())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (corrupt, "not what the manifest says"),
        (truncate, "not what the manifest says"),
        (remove, "missing"),
        (forge_manifest, "not what the manifest says"),
        (newer_pointer, "newer modelpress"),
    ],
)
def test_a_pack_that_fails_changes_nothing(
    store: Store, press: Call, repository: Call, caplog: pytest.LogCaptureFixture, damage: Call, said: str
) -> None:
    first = press(scale_model(2.0))
    models = repository("scale")
    second = press(scale_model(3.0))
    damage(store, second)
    for _ in range(3):
        models.poll()
    assert answer(models) == 2.0
    assert models.ready
    shown = row(models)
    assert (shown["state"], shown["version"]) == ("READY", first)
    assert said in shown["reason"]
    assert str(store.uri) not in shown["reason"]
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1  # once, not at every poll
    assert f"{first[:12]} goes on answering" in errors[0].getMessage()


def test_a_mended_pack_is_taken_up_without_a_new_entry(store: Store, press: Call, repository: Call) -> None:
    press(scale_model(2.0))
    models = repository("scale")
    key = shard_key(store, press(scale_model(3.0)))
    whole = store.get(key)
    flip_bit(store, key)
    models.poll()
    assert answer(models) == 2.0
    store.put(key, whole)
    models.poll()
    assert answer(models) == 3.0
    assert "reason" not in row(models)


def test_a_failed_pack_is_not_fetched_at_every_poll(store: Store, press: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    press(scale_model(2.0))
    models = Repository(store, ["scale"], threads=1, retry_seconds=60.0)
    models.start()
    key = shard_key(store, press(scale_model(3.0)))
    whole = store.get(key)
    flip_bit(store, key)
    models.poll()
    store.put(key, whole)
    models.poll()
    assert answer(models) == 2.0  # its wait is not over
    press(scale_model(4.0))
    models.poll()
    assert answer(models) == 4.0  # the pointer moved: no wait


def cut(store: Store) -> None:
    store.delete(keys.pointer("scale", "champion", 2))


def overwritten(store: Store) -> None:
    first = pointer.history(store, "scale", "champion")[0]
    entry = first.model_copy(update={"number": 2, "previous": first.digest})
    store.put(keys.pointer("scale", "champion", 2), entry.to_bytes())


@pytest.mark.parametrize("damage", [cut, overwritten])
def test_a_log_that_lost_its_newest_entry_swaps_nothing(
    store: Store, press: Call, repository: Call, damage: Call
) -> None:
    first = press(scale_model(2.0))
    press(scale_model(3.0))
    models = repository("scale")
    damage(store)
    models.poll()
    assert answer(models) == 3.0
    assert "lost or changed an entry" in row(models)["reason"]
    with pytest.raises(CorruptionError, match="restore the entry"):
        models.load("scale")
    assert answer(models) == 3.0
    models.unload("scale")
    models.load("scale")
    assert row(models) == {"name": "scale", "state": "READY", "version": first}


def test_looking_for_models_lists_no_manifests(
    store: Store, press: Call, repository: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    press(scale_model(2.0))
    models = repository()
    press(scale_model(3.0), "other")
    listed: list[str] = []
    plain = store.list
    monkeypatch.setattr(store, "list", lambda prefix="": listed.extend(i.key for i in plain(prefix)) or plain(prefix))
    models.poll()
    assert answer(models, "other") == 3.0
    assert listed
    assert all("/refs/champion/" in key for key in listed)


def test_a_store_that_is_away_changes_nothing(store: Store, press: Call, repository: Call) -> None:
    press(scale_model(2.0))
    models = repository("scale")
    folder = store.folder  # type: ignore[attr-defined]
    away = folder.with_name("away")
    folder.rename(away)
    models.poll()
    assert answer(models) == 2.0
    assert models.ready
    assert "pointer can't be read" in row(models)["reason"]
    with pytest.raises(StoreError):
        models.load("scale")
    away.rename(folder)
    models.poll()
    assert "reason" not in row(models)


def test_a_replaced_engine_goes_away_with_its_last_request(press: Call, repository: Call) -> None:
    press(scale_model(2.0))
    models = repository("scale")
    in_flight = models.model("scale").answering().engine
    old = weakref.ref(in_flight)
    press(scale_model(3.0))
    models.poll()
    assert in_flight.infer({"x": np.ones((1, WIDTH), np.float32)}, ["y"])["y"][0, 0] == 2 * WIDTH
    del in_flight
    gc.collect()
    assert old() is None


def test_named_models_must_load_at_the_start(store: Store, press: Call) -> None:
    with pytest.raises(NotFoundError, match="never set"):
        Repository(store, ["scale"]).start()
    corrupt(store, press(scale_model(2.0)))
    with pytest.raises(CorruptionError):
        Repository(store, ["scale"]).start()


def test_found_models_are_served_as_they_come(store: Store, press: Call, repository: Call) -> None:
    corrupt(store, press(scale_model(5.0), "broken"), "broken")
    models = repository()
    assert not models.ready
    assert row(models, "broken")["state"] == "UNAVAILABLE"
    with pytest.raises(NotReadyError, match="not what the manifest says"):
        models.model("broken").answering()
    press(scale_model(2.0))
    press(scale_model(3.0), "waiting", alias="challenger")
    models.poll()
    assert answer(models) == 2.0
    assert [row["name"] for row in models.index()] == ["broken", "scale"]


def test_an_alias_can_be_named(press: Call, repository: Call) -> None:
    press(scale_model(2.0))
    press(scale_model(3.0), alias="challenger")
    assert answer(repository("scale@challenger")) == 3.0


def test_only_what_was_asked_for_is_served(press: Call, repository: Call) -> None:
    press(scale_model(2.0))
    press(scale_model(3.0), "other")
    models = repository("scale")
    for act in (models.load, models.unload, models.model):
        with pytest.raises(NotServedError):
            act("other")


def test_unloaded_stays_out_until_asked_in(press: Call, repository: Call) -> None:
    press(scale_model(2.0))
    models = repository("scale")
    models.unload("scale")
    press(scale_model(3.0))
    models.poll()
    with pytest.raises(NotReadyError):
        models.model("scale").answering()
    assert models.ready
    models.load("scale")
    assert answer(models) == 3.0


@pytest.mark.parametrize("names", [["Scale"], ["../x"], ["scale@Bad"], ["scale", "scale@challenger"]])
def test_names_are_checked_before_anything_is_loaded(store: Store, names: list[str]) -> None:
    with pytest.raises(ConfigError):
        Repository(store, names)
