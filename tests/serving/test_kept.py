"""A server starts with what it kept when the store does not answer, holds that to the same proofs, and says so."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from modelpress import delta, graph, keys, pointer
from modelpress.checkpoint import Checkpoint
from modelpress.config import CompressConfig, ShardConfig
from modelpress.errors import SelfTestError, SetupError, StoreUnavailableError
from modelpress.publish import publish
from modelpress.shard import draft_manifest, write_shards
from modelpress.store import Store
from modelpress.store.local import LocalStore
from modelpress.store.s3 import S3Store
from serving.kept import Kept
from serving.protocol import decode_response, encode_request
from serving.repository import Repository
from tests.serving.conftest import WIDTH, Server, client_of, publish_pack, scale_model
from tests.serving.keeping import Shaky, files, folder, gone, once, started
from tests.serving.test_repository import answer
from tests.serving.test_self_test import with_golden

Call = Callable[..., Any]
__all__ = ["folder", "gone"]


def test_a_server_starts_with_what_it_kept_and_says_so(
    store: Store, press: Call, gone: S3Store, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    press(with_golden(scale_model(2.0)))
    pack = press(with_golden(scale_model(3.0)))
    once(store, folder, "scale")
    models, kept = started(gone, folder, "scale")
    with kept:
        assert answer(models) == 3.0
        loaded = models.model("scale").answering()
        assert (loaded.engine.pack, loaded.pointer.number) == (pack, 2)
        assert loaded.engine.tested is not None  # it was tested again
        assert models.ready
        assert models.lost is not None
        assert f"pack {pack}, kept on this machine, answers" in caplog.text


def test_without_a_copy_it_does_not_start(store: Store, press: Call, gone: S3Store, folder: Path) -> None:
    with pytest.raises(StoreUnavailableError):
        started(gone, folder, "scale")
    press(scale_model(2.0), "other")
    once(store, folder, "other")
    with pytest.raises(StoreUnavailableError):
        started(gone, folder, "scale")
    with pytest.raises(StoreUnavailableError):
        Repository(gone, ["scale"]).start()


def test_a_server_of_all_packs_starts_with_those_it_kept(
    store: Store, press: Call, gone: S3Store, folder: Path
) -> None:
    press(scale_model(2.0))
    press(scale_model(3.0), "other")
    once(store, folder)
    models, kept = started(gone, folder)
    with kept:
        assert [model.name for model in models.models()] == ["other", "scale"]
        assert (answer(models), answer(models, "other")) == (2.0, 3.0)


@pytest.mark.anyio
async def test_readiness_and_metadata_tell_the_truth_about_the_store(press: Call, folder: Path, tmp_path: Path) -> None:
    press(scale_model(2.0))
    store = Shaky(tmp_path / "store")
    models, kept = started(store, folder, "scale", offline_seconds=60.0)
    with kept:
        async with client_of(models) as client:
            assert (await client.get("/v2/health/ready")).json() == {"ready": True}
            assert "store" not in (await client.get("/v2/models/scale")).json()["parameters"]
            store.down = True
            models.poll()
            lost = models.lost
            assert lost is not None
            said = {"ready": True, "store": f"unreachable since {lost.isoformat(timespec='seconds')}"}
            found = await client.get("/v2/health/ready")
            assert (found.status_code, found.json()) == (200, said)
            assert (await client.get("/v2/models/scale")).json()["parameters"]["store"] == said["store"]
            models.poll()
            assert models.lost == lost  # since when, not when it was asked last
            models.model("scale").lost = datetime.now(UTC) - timedelta(seconds=61)
            found = await client.get("/v2/health/ready")
            assert (found.status_code, found.json()["ready"]) == (503, False)
            assert answer(models) == 2.0
            store.down = False
            models.poll()
            assert (await client.get("/v2/health/ready")).json() == {"ready": True}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_without_a_limit_it_stays_ready(press: Call, folder: Path, tmp_path: Path) -> None:
    press(scale_model(2.0))
    store = Shaky(tmp_path / "store")
    models, kept = started(store, folder)
    with kept:
        store.down = True
        models.poll()
        models.model("scale").lost = datetime.now(UTC) - timedelta(days=400)
        assert models.ready


def test_when_the_store_is_back_the_pointer_is_followed_on(press: Call, folder: Path, tmp_path: Path) -> None:
    press(scale_model(2.0))
    store = Shaky(tmp_path / "store")
    once(store, folder, "scale")
    store.down = True
    models, kept = started(store, folder, "scale")
    with kept:
        assert answer(models) == 2.0
        store.down = False
        press(scale_model(3.0))
        models.poll()
        assert (answer(models), models.lost) == (3.0, None)
    store.down = True
    models, kept = started(store, folder, "scale")
    with kept:
        assert answer(models) == 3.0


def test_what_was_replaced_is_not_kept_on(store: Store, press: Call, folder: Path) -> None:
    press(scale_model(2.0))
    models, kept = started(store, folder, "scale")
    with kept:
        first = files(folder)
        press(scale_model(3.0))
        models.poll()
        second = files(folder)
        assert second
        assert first - second
        assert kept.aliases() == [("scale", "champion")]
        manifests = [info.key for info in kept.store.list("packs/") if keys.manifest_owner(info.key)]
        assert manifests == [keys.manifest("scale", models.model("scale").answering().engine.pack)]


def test_packs_that_fail_do_not_fill_the_disk(store: Store, press: Call, folder: Path) -> None:
    press(with_golden(scale_model(2.0)))
    models, kept = started(store, folder, "scale")
    with kept:
        sizes = []
        for number in range(5):
            press(with_golden(scale_model(3.0 + number), of=scale_model(9.5)))
            with suppress(SelfTestError):
                models.load("scale")
                pytest.fail("it must not load")
            sizes.append(len(files(folder)))
        assert sizes == sizes[:1] * 5
        assert answer(models) == 2.0


def test_two_servers_do_not_share_a_folder(store: Store, folder: Path) -> None:
    with Kept(folder, store), pytest.raises(SetupError, match="another server"):
        Kept(folder, store)
    Kept(folder, store).close()


def test_a_folder_that_can_not_be_written_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="MODELPRESS_SERVING_KEEP_FOLDER"):
        Kept(tmp_path / "file" / "kept", store)


def test_a_disk_that_takes_nothing_stops_no_service(
    store: Store, press: Call, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    press(scale_model(2.0))
    kept = Kept(folder, store)
    with kept:
        monkeypatch.setattr(kept.cache, "keep", lambda *_: None)  # what the cache does when the disk is full
        models = Repository(store, ["scale"], threads=1, retry_seconds=0.0, kept=kept)
        with caplog.at_level(logging.WARNING):
            models.start()
            models.poll()
        assert answer(models) == 2.0
        assert caplog.text.count("is served and not kept") == 1
        assert kept.aliases() == []  # and no half of a copy


def test_a_folder_that_is_lost_stops_no_service(
    store: Store, press: Call, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    press(scale_model(2.0))
    models, kept = started(store, folder, "scale")
    with kept:
        shutil.rmtree(folder)
        (folder.parent / "kept").write_text("a file stands where the folder was")
        press(scale_model(3.0))
        models.poll()
        assert answer(models) == 3.0
    assert "is served and not kept" in caplog.text


def test_a_load_asks_the_store_for_no_blob_twice(press: Call, folder: Path, tmp_path: Path) -> None:
    press(with_golden(scale_model(2.0)))
    read: list[str] = []

    class Counting(LocalStore):
        def read_into(self, key: str, *arguments: Any, **options: Any) -> None:
            read.append(key)
            super().read_into(key, *arguments, **options)

    once(Counting(tmp_path / "store"), folder, "scale")
    assert read
    assert len(read) == len(set(read))
    read.clear()
    once(Counting(tmp_path / "store"), folder, "scale")
    assert read == []


def test_a_copy_of_a_difference_brings_its_base(store: Store, gone: S3Store, folder: Path, tmp_path: Path) -> None:
    """The base is promoted first, and so kept; with the version after it, both are, and nothing else."""
    base = publish_pack(store, tmp_path / "base", two_tables(1), "tables")
    once(store, folder, "tables")
    config = CompressConfig(base=base, max_delta_share=1.0)
    coded, report = delta.compress_against(two_tables(2), config, delta.open_base(store, "tables", base))
    shards, _ = write_shards(coded, ShardConfig(), tmp_path / "version")
    manifest, blobs = draft_manifest("tables", coded, shards)
    assert manifest.base == base
    pack = publish(store, manifest, shards, blobs, source_bytes=report.raw_bytes).pack
    pointer.append(store, "tables", "champion", pack, "promote")
    once(store, folder, "tables")
    models, kept = started(gone, folder, "tables")
    with kept:
        engine = models.model("tables").answering().engine
        assert engine.pack == pack
        found = engine.infer({"at": np.array([3])}, ["y"])["y"]
        assert (found == two_tables(2).tensors["one"][3].numpy() + two_tables(2).tensors["two"][3].numpy()).all()


def two_tables(value: int) -> Checkpoint:
    """The sum of a row of each of two tables: one is always the same, of the other one row is `value`."""
    random = np.random.default_rng(0)
    one, two = (
        random.integers(-100, 100, (64, 64), dtype=np.int32),
        random.integers(-100, 100, (64, 64), dtype=np.int32),
    )
    two[3] = value
    at = helper.make_tensor_value_info("at", TensorProto.INT64, ["batch"])
    y = helper.make_tensor_value_info("y", TensorProto.INT32, ["batch", 64])
    nodes = [
        helper.make_node("Gather", ["one", "at"], ["first"]),
        helper.make_node("Gather", ["two", "at"], ["second"]),
        helper.make_node("Add", ["first", "second"], ["y"]),
    ]
    weights = [onnx.numpy_helper.from_array(one, "one"), onnx.numpy_helper.from_array(two, "two")]
    body = helper.make_graph(nodes, "tables", [at], [y], weights)
    return graph.split(helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


def test_a_process_starts_without_its_store(
    store: Store, press: Call, serve: Call, gone: S3Store, folder: Path
) -> None:
    """From settings to answers, with a refused connection where the store should be."""
    pack = press(with_golden(scale_model(2.0)))
    keeping = {"MODELPRESS_SERVING_KEEP_FOLDER": str(folder)}
    first: Server = serve("scale", **keeping)
    assert first.client.get("/v2/health/ready").json() == {"ready": True}
    assert first.stop() == 0
    second: Server = serve("scale", MODELPRESS_STORE=gone.uri, MODELPRESS_SERVING_OFFLINE_SECONDS="86400", **keeping)
    answer = second.client.post(
        "/v2/models/scale/infer", content=encode_request({"x": np.ones((1, WIDTH), np.float32)})
    )
    assert decode_response(answer.content)["y"][0, 0] == 2 * WIDTH
    assert answer.json()["model_version"] == pack
    ready = second.client.get("/v2/health/ready")
    assert ready.status_code == 200
    assert ready.json()["store"].startswith("unreachable since ")
    assert second.client.get("/v2/models/scale").json()["parameters"]["golden"] is True
    assert second.stop() == 0
    assert "kept on this machine, answers" in "".join(second.lines)
