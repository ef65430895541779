"""Folders of models, and how the tests publish them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modelpress import load
from modelpress.config import CompressConfig, ShardConfig
from modelpress.folder import publish_folder
from modelpress.store import Store
from modelpress.store.local import LocalStore
from tests.decoders import make_decoder_folder, make_text_folder

SMALL: dict[str, Any] = {
    "shard": ShardConfig(max_shard_size=8_000),
    "compress": CompressConfig(chunk_symbols=4096, min_decode_bytes_per_second=0),
}
"""Tensors that are cut into several shards."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return LocalStore(tmp_path / "store")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_folder(tmp_path_factory.mktemp("texts") / "texts", ("json",))


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """A tied Llama in bfloat16, in several files, with its tokenizer and its card."""
    folder = make_decoder_folder(tmp_path_factory.mktemp("decoder") / "model", texts)
    config = LlamaConfig.from_pretrained(folder)
    config.tie_word_embeddings = True
    (folder / "model.safetensors").unlink()
    torch.manual_seed(1)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def publish(store: Store, folder: Path, work: Path, **options: Any) -> str:
    return publish_folder(store, folder, "demo", work=work, **options).pack


def again(store: Store, folder: Path, tmp_path: Path, layout: Any = "huggingface", **options: Any) -> Path:
    """Publish a folder and pull it."""
    load.pull(store, "demo", publish(store, folder, tmp_path / "work", **options), tmp_path / "pulled", layout)
    return tmp_path / "pulled"


def copied(decoder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(decoder, tmp_path / "model"))
