"""What must not be published is refused by its name, before anything is written."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

from modelpress import load
from modelpress.errors import ConfigError, CorruptionError, ModelpressError, WorkloadError
from modelpress.store import Store
from tests.folder.conftest import contents, copied, publish

REFUSED = {
    "pytorch_model.bin": "pickle",
    "sub/optimizer.PT": "pickle",
    ".env": "hidden",
    ".git/config": "hidden",
    "sub/.cache/x": "hidden",
    "prod.env": "keys and passwords",
    "server.pem": "keys and passwords",
    "id_rsa": "keys and passwords",
    "credentials.json": "keys and passwords",
    "a:b": "cannot hold",
    "line\nbreak": "cannot hold",
    "modelpress.json": "manifest",
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_must_not_be_published_is_refused_and_can_be_ignored(
    store: Store, decoder: Path, tmp_path: Path, name: str
) -> None:
    folder = copied(decoder, tmp_path)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("a secret")
    with pytest.raises(ConfigError, match=REFUSED[name]) as caught:
        publish(store, folder, tmp_path / "work")
    assert "--ignore" in str(caught.value)
    assert "a secret" not in str(caught.value)
    assert not (tmp_path / "store").exists()
    (tmp_path / "work").mkdir()
    pattern = next(part for part in Path(name).parts if part.startswith(".") or part == Path(name).name)
    names = [file.name for file in load.load_manifest(
        store, "demo", publish(store, folder, tmp_path / "work", ignore=[pattern])
    ).files]  # fmt: skip
    assert sorted(names) == sorted(one for one in contents(decoder) if not one.endswith(".safetensors"))


def test_links(store: Store, decoder: Path, tmp_path: Path) -> None:
    """As in a hub's cache: every file is a link to a blob elsewhere."""
    folder, blobs = copied(decoder, tmp_path), tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{number:064x}")
        path.symlink_to(blobs / f"{number:064x}")
    with pytest.raises(ConfigError, match=r"a link that leads outside[\s\S]*--follow-links"):
        publish(store, folder, tmp_path / "work")
    digest = publish(store, folder, tmp_path / "work", follow_links=True)
    load.pull(store, "demo", digest, tmp_path / "pulled", "huggingface")
    found = contents(tmp_path / "pulled")
    del found["modelpress.json"]
    assert found == contents(decoder)


@pytest.mark.parametrize("target", ["..", "id_rsa", "nowhere", "/dev/null", "pipe", "model/notes.txt"])
def test_links_to_what_is_no_model_are_refused(store: Store, decoder: Path, tmp_path: Path, target: str) -> None:
    folder = copied(decoder, tmp_path)
    (tmp_path / "id_rsa").write_text("a secret")
    os.mkfifo(tmp_path / "pipe")
    (folder / "notes.txt").symlink_to(target if target.startswith("/") else tmp_path / target)
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        publish(store, folder, tmp_path / "work", follow_links=True)


def test_a_link_into_a_hidden_folder_is_refused(store: Store, decoder: Path, tmp_path: Path) -> None:
    folder = copied(decoder, tmp_path)
    (folder / ".git").mkdir()
    (folder / ".git/config").write_text("a secret")
    (folder / "notes.txt").symlink_to(".git/config")
    with pytest.raises(ConfigError, match=r"'notes\.txt' \(hidden\)"):
        publish(store, folder, tmp_path / "work", ignore=[".git"])


def test_a_pattern_that_fits_nothing_is_an_error(store: Store, decoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'\*\.onnx'"):
        publish(store, decoder, tmp_path / "work", ignore=["*.onnx"])


def test_half_a_model_is_refused(store: Store, decoder: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"model-00001-of-\d+\.safetensors left out"):
        publish(store, decoder, tmp_path / "work", ignore=["model-00001-*"])


def broken(folder: Path, how: str) -> None:
    first = sorted(folder.glob("*.safetensors"))[0]
    if how == "cut":
        os.truncate(first, first.stat().st_size - 10)
    elif how == "missing":
        first.unlink()
    elif how == "no weights":
        for path in folder.glob("*.safetensors"):
            path.unlink()
    elif how == "twice":
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        file, _ = Counter(index["weight_map"].values()).most_common(1)[0]
        shutil.copy(folder / file, folder / "more.safetensors")
        name = next(name for name, held in index["weight_map"].items() if held == file)
        index["weight_map"][name] = "more.safetensors"
        path.write_text(json.dumps(index))
    else:
        first.write_text("version https://git-lfs.github.com/spec/v1\n")


@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        ("cut", CorruptionError, "cut short"),
        ("missing", WorkloadError, "no model-00001"),
        ("no weights", WorkloadError, "none of them .safetensors"),
        ("twice", WorkloadError, "another file of the model"),
        ("pointer", CorruptionError, "a header of"),
    ],
)
def test_a_broken_folder_is_refused_by_name(
    store: Store, decoder: Path, tmp_path: Path, how: str, kind: type[ModelpressError], said: str
) -> None:
    folder = copied(decoder, tmp_path)
    broken(folder, how)
    with pytest.raises(kind, match=said):
        publish(store, folder, tmp_path / "work")
    assert not (tmp_path / "store").exists()
