"""What changed between two packs: each kind of change is found, and nothing else."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modelpress import changes, pointer, scores
from modelpress.checkpoint import Checkpoint
from modelpress.cipher import LocalKey, seal_pack, secrets
from modelpress.errors import NotFoundError
from modelpress.scores import Scored
from modelpress.store import Store
from modelpress.store.local import LocalStore
from tests.packs import Pack, make_pack, torch_checkpoint

WEIGHT = "layer.0.weight"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return LocalStore(tmp_path_factory.mktemp("changes") / "store")


@pytest.fixture(scope="module")
def base(store: Store, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The champion that others are compared with."""
    pack = published(store, tmp_path_factory.mktemp("base"), torch_checkpoint(), right=90)
    pointer.append(store, "demo", "champion", pack, "promote")
    return pack


def published(
    store: Store,
    folder: Path,
    checkpoint: Checkpoint,
    right: float = 90,
    samples: str = "these",
    metric: str = "accuracy",
    further: dict[str, np.ndarray] | None = None,
    **manifest: Any,
) -> str:
    scored = Scored((np.arange(100) < right).astype(float), samples, metric, further or {})
    file = {scores.SCORES_FILE: scores.dump({"candidate": scored, "source": scored})}
    pack = make_pack(folder, replace(checkpoint, files=checkpoint.files | file))
    pack = replace(pack, manifest=pack.manifest.model_copy(update=manifest))
    pack.publish(store)
    return pack.digest


def against(store: Store, base: str, other: str) -> changes.ChangesReport:
    return changes.compare(store, ("demo", base), ("demo", other))


def test_a_pack_and_itself_differ_in_nothing(store: Store, base: str) -> None:
    found = changes.compare(store, ("demo", "champion"), ("demo", base[:12]))
    assert (found.config, found.about, found.tensors, found.files) == ([], [], [], [])
    assert found.equal_tensors == len(torch_checkpoint().tensors)
    (quality,) = found.quality
    assert (quality.difference, quality.paired) == (0, True)
    assert quality.low < 0 < quality.high


def test_tensors_that_came_went_and_changed(store: Store, base: str, tmp_path: Path) -> None:
    before = torch_checkpoint()
    tensors = dict(before.tensors)
    tensors["new"] = torch.ones(3, 4)
    del tensors["layer.0.bias"]
    tensors["scale"] = torch.tensor(0.25)
    tensors["layer.2.weight"] = tensors["layer.2.weight"].half()
    found = against(store, base, published(store, tmp_path, replace(before, tensors=tensors)))
    assert {one.name: (one.what, one.before, one.after) for one in found.tensors} == {
        "new": ("added", None, "F32 3×4"),
        "layer.0.bias": ("removed", "F32 64", None),
        "scale": ("values", "F32 scalar", "F32 scalar"),
        "layer.2.weight": ("form", "F32 300×64", "F16 300×64"),
    }
    assert found.equal_tensors == len(before.tensors) - 3
    assert next(one for one in found.tensors if one.name == "new").stored_before == 0
    assert found.before.raw_bytes - found.after.raw_bytes == 300 * 64 * 2 + 64 * 4 - 3 * 4 * 4


def test_what_is_stored_otherwise_holds_the_same_numbers(store: Store, base: str, tmp_path: Path) -> None:
    from modelpress.compress import compress
    from modelpress.config import ShardConfig
    from modelpress.publish import publish
    from modelpress.shard import draft_manifest, write_shards

    coded, _ = compress(torch_checkpoint(), None)
    shards, _ = write_shards(coded, ShardConfig(), tmp_path)
    manifest, blobs = draft_manifest("demo", coded, shards)
    raw = publish(store, manifest, shards, blobs, source_bytes=1).pack
    found = against(store, base, raw)
    assert {one.what for one in found.tensors} == {"coding"}
    assert found.unmeasured is not None
    assert "published without scores" in found.unmeasured
    assert [one.field for one in found.files] == [scores.SCORES_FILE]


def test_the_recipe_and_the_rest_of_the_manifest_by_path(store: Store, base: str, tmp_path: Path) -> None:
    other = published(
        store,
        tmp_path,
        torch_checkpoint(),
        config={"quantize": {"method": "static", "targets": ["a", "b"]}, "prune": None},
        licence="MIT",
        lineage={"source": "c" * 64},
    )
    found = against(store, base, other)
    assert [(one.field, one.before, one.after) for one in found.config] == [
        ("prune", None, "null"),
        ("quantize.method", None, '"static"'),
        ("quantize.targets", None, '["a", "b"]'),
    ]
    assert {one.field: (one.before, one.after) for one in found.about}["licence"] == ('"unknown"', '"MIT"')
    assert {one.field for one in found.about} == {"licence", "lineage", "lineage.source"}
    assert found.tensors == []
    assert found.shared_bytes > 0.9 * found.before.published_bytes - 20_000


def test_quality_is_paired_on_the_same_samples_and_wider_on_others(store: Store, base: str, tmp_path: Path) -> None:
    same = against(store, base, published(store, tmp_path / "1", torch_checkpoint(), right=80))
    moved = against(store, base, published(store, tmp_path / "2", torch_checkpoint(), right=80, samples="those"))
    (paired,), (apart,) = same.quality, moved.quality
    assert (paired.before, paired.after, paired.difference) == (0.9, 0.8, pytest.approx(-0.1))
    assert (paired.paired, apart.paired) == (True, False)
    assert paired.high < 0
    assert apart.high - apart.low > paired.high - paired.low


def test_further_metrics_are_compared_where_both_have_them(store: Store, base: str, tmp_path: Path) -> None:
    f1 = {"f1": np.linspace(0, 1, 100)}
    one = published(store, tmp_path / "1", torch_checkpoint(1), further=f1)
    two = published(store, tmp_path / "2", torch_checkpoint(2), further=f1 | {"mrr": np.ones(100)})
    assert [quality.metric for quality in against(store, one, two).quality] == ["accuracy", "f1"]
    assert [quality.metric for quality in against(store, base, two).quality] == ["accuracy"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"metric": "mrr"}, "one was scored by accuracy, the other by mrr"),
        ({"further": {"accuracy": np.full(100, np.nan)}, "metric": "x"}, "accuracy of demo@"),
    ],
)
def test_metrics_that_cannot_be_compared_are_named(
    store: Store, base: str, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    found = against(store, base, published(store, tmp_path, torch_checkpoint(5), **changed))
    assert found.quality == []
    assert found.unmeasured is not None
    assert said in found.unmeasured


def test_an_encrypted_pack_without_its_key_is_compared_by_its_manifest(
    store: Store, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = secrets.current(store, "demo", [LocalKey(b"K" * 32)])
    scored = Scored(np.ones(100), "these", "accuracy")
    file = {scores.SCORES_FILE: scores.dump({"candidate": scored})}
    checkpoint = torch_checkpoint()
    pack = make_pack(tmp_path / "shards", replace(checkpoint, files=checkpoint.files | file))
    manifest, shards, blobs = seal_pack(pack.manifest, pack.shards, pack.blobs, secret, tmp_path / "sealed")
    sealed = Pack(manifest, shards, blobs, pack.checkpoint)
    sealed.publish(store)
    found = against(store, base, sealed.digest)
    assert found.unmeasured is not None
    assert f"demo@{sealed.digest[:12]} can't be opened" in found.unmeasured
    assert "encryption" in {one.field for one in found.about}
    monkeypatch.setenv("MODELPRESS_KEY", base64.b64encode(b"K" * 32).decode())
    (quality,) = against(store, base, sealed.digest).quality
    assert quality.difference == pytest.approx(0.1)


def test_a_pack_that_is_not_there_is_named(store: Store, base: str) -> None:
    with pytest.raises(NotFoundError):
        changes.compare(store, ("demo", base), ("demo", "0" * 64))
