"""A tiny sentence encoder as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tokenizers
import torch
from transformers import BertConfig, BertModel

WORDS = [f"word{index}" for index in range(60)]


def make_encoder_folder(path: Path, pairs: int, hidden: int = 16, intermediate: int = 24) -> Path:
    """Three random layers with a word-level tokenizer, and retrieval pairs in `pairs.jsonl`."""
    config = BertConfig(
        vocab_size=64, hidden_size=hidden, num_hidden_layers=3, num_attention_heads=4, intermediate_size=intermediate,
        max_position_embeddings=20,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(path)
    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{word: index + 2 for index, word in enumerate(WORDS)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
    (path / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n")
    random = np.random.default_rng(0)
    lines = []
    for _ in range(pairs):
        topic = random.choice(WORDS, 3).tolist()
        lines.append({"query": " ".join(topic), "document": " ".join(topic + random.choice(WORDS, 5).tolist())})
    (path / "pairs.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return path
