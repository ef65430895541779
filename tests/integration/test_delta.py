"""The line twice: a model, then the same a little trained, published as the difference and served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.optimize import OptimizeResult, optimize
from modelpress import keys, load, pointer
from modelpress.config import OptimizeConfig
from modelpress.errors import NotFoundError
from modelpress.pack_files import read_reports
from modelpress.store import Store, open_store
from serving.engine import load_engine
from tests.integration.small_workloads import WIDTH

NAME = "small"


def config(tuned: float = 0.0, base: str | None = None) -> OptimizeConfig:
    recipe: dict[str, Any] = {
        "name": NAME,
        "workload": {
            "kind": "custom",
            "factory": "tests.integration.small_workloads:Small",
            "options": {"tuned": tuned},
            "calibration_samples": 100,
        },
        "quantize": {"method": "static", "max_quality_drop": 0.1, "scales_from": base},
        "compress": {"min_decode_bytes_per_second": 0, "base": base},
        "evaluate": {"batch_sizes": [1], "latency_seconds": 0.02, "max_quality_drop": 0.5},
        "gate": {"margin": 0.4, "min_compression_ratio": 0.1},
    }
    return OptimizeConfig.model_validate(recipe)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, prefect_server: str, mlflow_server: str) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("delta")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELPRESS_HOME", str(home))
        patch.setenv("MODELPRESS_TRACKING_URI", mlflow_server)
        for name in ("MODELPRESS_STORE", "MODELPRESS_WORK"):
            patch.delenv(name, raising=False)
        yield home


@pytest.fixture(scope="module")
def store(home: Path) -> Store:
    return open_store(str(home / "store"))


@pytest.fixture(scope="module")
def first(home: Path) -> OptimizeResult:
    result = optimize(config())
    assert result.decision is not None
    assert result.decision.promote, result.decision.line()
    return result


@pytest.fixture(scope="module")
def second(first: OptimizeResult) -> OptimizeResult:
    return optimize(config(0.002, "champion"))


def test_there_is_no_base_before_the_first_version(home: Path) -> None:
    with pytest.raises(NotFoundError, match="no alias 'nobody'"):
        optimize(config(base="nobody"))


def test_a_tuned_version_is_the_difference_to_the_champion(
    store: Store, first: OptimizeResult, second: OptimizeResult
) -> None:
    manifest = load.load_manifest(store, NAME, second.pack)
    assert manifest.base == first.pack
    assert manifest.config["compress"]["base"] == manifest.config["quantize"]["scales_from"] == first.pack
    entries = {entry.name: entry for entry in manifest.tensors}
    codes = [entry for name, entry in entries.items() if name.endswith("_quantized") and entry.dtype == "I8"]
    assert codes
    assert all(entry.base == entry.name for entry in codes)
    whole = {entry.name: entry for entry in load.load_manifest(store, NAME, first.pack).tensors}
    assert sum(entry.stored_bytes for entry in codes) < 0.3 * sum(whole[one.name].stored_bytes for one in codes)
    reports = read_reports(manifest, load.fetcher(store, manifest))
    assert reports["quantize"]["frozen.fresh_weights"] == 0
    assert reports["quantize"]["frozen.frozen_weights"] == 2
    assert reports["compress"]["delta.share"] < 0.5


def test_it_was_judged_from_the_bytes_and_is_served(store: Store, second: OptimizeResult) -> None:
    assert second.decision is not None
    assert second.decision.promote, second.decision.line()
    current = pointer.current(store, NAME, "champion")
    assert current is not None
    assert current.pack == second.pack
    engine = load_engine(store, NAME, second.pack, "CPUExecutionProvider", 1)
    (answer,) = engine.infer({"input": np.ones((3, WIDTH), np.float32)}, [engine.outputs[0].name]).values()
    assert answer.shape == (3, 16)
    assert np.isfinite(answer).all()


def test_the_same_version_again_is_the_same_pack_though_it_is_the_champion_now(
    store: Store, first: OptimizeResult, second: OptimizeResult
) -> None:
    before = {info.key for info in store.list(keys.BLOBS)}
    again = optimize(config(0.002, "champion"))
    assert again.pack == second.pack
    assert "quantize" not in again.recomputed
    assert {info.key for info in store.list(keys.BLOBS)} == before
