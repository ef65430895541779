"""Real text and tiny decoders: a folder of Python's own sources, and a Hugging Face folder of a random Llama."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modelpress.workloads.text_corpus import Text, train_tokenizer

SIZES: dict[str, int | float | str | bool | list[int]] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
"""A `tiny-decoder` that trains in a second."""


def make_text_folder(path: Path, packages: tuple[str, ...] = ("json", "concurrent", "wsgiref")) -> Path:
    """Some packages of the standard library, as texts: 21 files, 180 kB."""
    for package in packages:
        shutil.copytree(
            Path(sysconfig.get_path("stdlib")) / package, path / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    return path


def make_decoder_folder(path: Path, texts: Path, layers: int = 2) -> Path:
    """A random Llama with a byte-level BPE of the texts."""
    content = [Text(str(one), one.read_text()) for one in sorted(texts.rglob("*.py"))]
    tokenizer = train_tokenizer(content, 300)
    config = LlamaConfig(
        vocab_size=304, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return path
