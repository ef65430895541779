"""A folder that is coded tensor by tensor: killed, on a full disk, changed meanwhile, and at once with another run."""

from __future__ import annotations

import resource
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from modelpress import load
from modelpress.config import ShardConfig
from modelpress.errors import ConfigError, StageError, StoreFullError
from modelpress.folder.staging import Staged
from modelpress.store import Store
from modelpress.store.local import LocalStore
from tests.folder.conftest import SMALL, copied, publish

ROOT = Path(__file__).parents[2]


def test_a_folder_that_changes_meanwhile_is_not_published(store: Store, decoder: Path, tmp_path: Path) -> None:
    folder = copied(decoder, tmp_path)

    def progress(done: int, total: int, note: str = "") -> None:
        if note.startswith("coding"):
            (folder / "config.json").write_text("{}")

    with pytest.raises(StageError, match=r"'config\.json' was changed"):
        publish(store, folder, tmp_path / "work", progress=progress)
    assert not (tmp_path / "store").exists()
    (place,) = (tmp_path / "work").iterdir()
    assert stat.S_IMODE(place.stat().st_mode) == 0o700, "what waits there is the model, encrypted or not"


def test_a_full_disk_says_so(store: Store, decoder: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        with pytest.raises(StoreFullError, match="shard-00000"):
            publish(store, decoder, tmp_path / "work", **SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "store").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from modelpress.folder import publish_folder
from modelpress.store.local import LocalStore
from tests.folder.conftest import SMALL

def progress(done, total, note=""):
    if note.startswith("coding") and done == total - 4:
        os.kill(os.getpid(), signal.SIGKILL)

store, folder, work = map(Path, sys.argv[1:])
publish_folder(LocalStore(store), folder, "demo", work=work, progress=progress, **SMALL)
"""


@pytest.mark.faults
def test_a_killed_run_goes_on_and_ends_with_the_same_digest(store: Store, decoder: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "store"), str(decoder), str(work)],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (tmp_path / "store").exists()
    (place,) = work.iterdir()
    last = max(place.glob("shard-*.json"))
    last.write_bytes(last.read_bytes()[:-20])  # as a crash may leave it
    found = Staged(place)
    found.find()
    assert 0 < len(found.records) < len(list(place.glob("shard-*.json")))
    coded: list[str] = []

    def progress(done: int, total: int, note: str = "") -> None:
        coded.extend([note] if note.startswith("coding") else [])

    resumed = publish(store, decoder, work, **SMALL, progress=progress)
    names = [tensor.name for tensor in load.load_manifest(store, "demo", resumed).tensors]
    assert 0 < len(coded) < len(names)
    fresh = LocalStore(tmp_path / "fresh")
    assert resumed == publish(fresh, decoder, tmp_path / "other", **SMALL)
    assert not list(work.iterdir())


@pytest.mark.parametrize("by", ["size", "layer"])
def test_shards_are_those_of_all_tensors_at_once(decoder: Path, tmp_path: Path, by: Any) -> None:
    """Coding one by one, and going on at any shard, cuts where `write_shards` cuts."""
    from modelpress.checkpoint import Checkpoint
    from modelpress.compress import compress, natural_key
    from modelpress.folder.staging import stage
    from modelpress.progress import silent
    from modelpress.shard import write_shards

    tensors: dict[str, torch.Tensor] = {}
    for path in decoder.glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(path)
    config = ShardConfig(by=by, max_shard_size=6_000)
    coded, _ = compress(Checkpoint("torch", tensors), None)
    expected, _ = write_shards(coded, config, tmp_path / "whole")
    assert len(expected) > 8
    names = sorted(tensors, key=natural_key)
    for kept in (0, 1, len(expected) // 2, len(expected)):
        place = tmp_path / f"{kept}"
        if kept:
            shutil.copytree(tmp_path / "0", place)
            for path in place.iterdir():
                if int(path.stem.removeprefix("shard-")) >= kept:
                    path.unlink()
        staged = stage(names, tensors.__getitem__, place, None, config, silent)
        assert [one.sha256 for one in staged.shards] == [one.sha256 for one in expected]
        assert [one.tensors for one in staged.shards] == [one.tensors for one in expected]
        assert [entry.name for entry in staged.entries] == names


def test_two_processes_do_not_take_the_same_place(store: Store, decoder: Path, tmp_path: Path) -> None:
    def progress(done: int, total: int, note: str = "") -> None:
        if note.startswith("coding") and done == 3:
            with pytest.raises(ConfigError, match="another process"):
                publish(store, decoder, tmp_path / "work")
            refused.append(done)

    refused: list[int] = []
    publish(store, decoder, tmp_path / "work", progress=progress)
    assert refused == [3]


def test_the_ends_of_a_wrapped_model_lie_apart_although_its_layers_come_later(tmp_path: Path) -> None:
    """The first shard is full before the names are read that tell a wrapper from a layer."""
    from modelpress.folder.staging import stage
    from modelpress.progress import silent

    tensors = {"m.embed.w": torch.rand(100), "m.head.w": torch.rand(100)}
    tensors |= {"m.inner.w": torch.rand(1500), "m.layers.0.w": torch.rand(100)}
    config = ShardConfig(by="layer", max_shard_size=6_700)
    staged = stage(list(tensors), tensors.__getitem__, tmp_path / "place", None, config, silent)
    assert [one.tensors for one in staged.shards] == [(name,) for name in tensors]
