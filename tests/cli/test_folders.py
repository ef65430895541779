"""`publish` and `pull --as` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from modelpress import load, pointer
from modelpress.errors import ConfigError, EncryptionKeyError, WorkloadError
from modelpress.store import Store
from tests.cli.conftest import Run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    tensors = {"w": torch.randn(300, 40, generator=torch.Generator().manual_seed(0)).bfloat16(), "b": torch.zeros(40)}
    safetensors.torch.save_file(tensors, made / "model.safetensors", {"format": "pt"})
    (made / "config.json").write_text('{"model_type": "bert"}')
    (made / "README.md").write_text('---\nlicense: "mit"\n---\n')
    return made


def test_publish_and_pull(store: Store, folder: Path, tmp_path: Path, run: Run) -> None:
    code, out, err = run(
        "publish", str(folder), "--name", "ours", "--alias", "blue", "--max-shard-size", "1000000", "--json"
    )
    assert code == 0, err
    report = json.loads(out)
    entry = pointer.current(store, "ours", "blue")
    assert entry is not None
    assert (entry.pack, entry.reason) == (report["pack"], "publish")
    assert load.load_manifest(store, "ours", report["pack"]).licence == "mit"
    assert report["compression_ratio"] > 1
    code, out, err = run("pull", "ours@blue", "--as", "huggingface", "--to", str(tmp_path / "pulled"))
    assert code == 0, err
    assert report["pack"] in out
    for path in folder.iterdir():
        assert (tmp_path / "pulled" / path.name).read_bytes() == path.read_bytes()
    code, out, err = run("inspect", "ours@blue")
    assert code == 0, err
    assert "planes-huffman" in out
    code, _, err = run("pull", "ours@blue", "--as", "triton", "--to", str(tmp_path / "triton"))
    assert (code, "layout checkpoint" in err) == (ConfigError.exit_code, True)
    assert not list((tmp_path / "home/publish").iterdir())


def test_publish_says_what_it_cannot_take(store: Store, folder: Path, tmp_path: Path, run: Run) -> None:
    code, _, err = run("publish", str(tmp_path / "none"), "--name", "ours")
    assert (code, "no folder" in err) == (WorkloadError.exit_code, True)
    for arguments in (["--name", "UPPER"], ["--name", "ours", "--alias", "1"], ["--name", "ours", "--ignore", "*.pt"]):
        assert run("publish", str(folder), *arguments)[0] == ConfigError.exit_code
    code, _, err = run("publish", str(folder), "--name", "ours", "--encrypt")
    assert (code, "MODELPRESS_KEY_FILE" in err) == (EncryptionKeyError.exit_code, True)
    (folder / "model.pt").write_bytes(b"")
    code, _, err = run("publish", str(folder), "--name", "ours")
    assert (code, "'model.pt'" in err) == (ConfigError.exit_code, True)
    assert not (tmp_path / "store").exists()
    code, out, _ = run("publish", str(folder), "--name", "ours", "--ignore", "*.pt", "--licence", "apache-2.0")
    assert (code, "→" in out) == (0, True)
