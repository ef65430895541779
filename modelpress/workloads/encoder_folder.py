"""A Hugging Face folder of a sentence encoder: how long its texts may be, and how it pools.

What means something that is not done here is refused by name.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import tokenizers
import torch
from torch import Tensor, nn

from modelpress.errors import WorkloadError
from modelpress.process import TextInput
from modelpress.workloads.hf_folder import read_json, read_number, read_object

DEFAULT_MAX_LENGTH = 256
"""Tokens, for a folder that states none."""

LARGEST_MAX_LENGTH = 2**20
"""Tokens; transformers writes 10³⁰ for "not known"."""

ENCODED_AT_ONCE = 256
"""Texts whose tokens are held together while they are compared."""

MAX_LENGTHS = {"sentence_bert_config.json": "max_seq_length", "tokenizer_config.json": "model_max_length"}

MODULES = {"Transformer", "Pooling", "Normalize"}
"""Modules of sentence-transformers that `SentenceEncoder` does the same as."""

MEAN = "pooling_mode_mean_tokens"


def read_max_length(folder: Path) -> int:
    """The first length that the folder states, within what its position embeddings hold.

    Raises:
        WorkloadError: a file is no JSON object, or the length no number of tokens.
    """
    lengths = []
    for name, key in MAX_LENGTHS.items():
        stated = read_number(folder / name, key) if (folder / name).exists() else None
        if stated is not None:
            lengths.append(stated)
            break
    positions = read_number(folder / "config.json", "max_position_embeddings")
    length = min([*(lengths or [DEFAULT_MAX_LENGTH]), *([] if positions is None else [positions])])
    if length > LARGEST_MAX_LENGTH:
        raise WorkloadError(
            f"reading the longest text that {folder} takes",
            found=f"{length:.3g} tokens",
            expected=f"at most {LARGEST_MAX_LENGTH:,}",
            fix='state it: {"max_seq_length": 512} in sentence_bert_config.json',
        )
    return length


def check_pooling(folder: Path) -> None:
    """Refuse a folder of sentence-transformers that makes its embeddings otherwise than by the mean over the tokens.

    A folder that says nothing is taken for one that pools by the mean.

    Raises:
        WorkloadError: another pooling, further modules, or files that cannot be read.
    """
    path = folder / "modules.json"
    if not path.exists():
        if (folder / "1_Pooling" / "config.json").exists():
            _check_pooling_config(folder / "1_Pooling" / "config.json")
        return
    modules = read_json(path)
    try:
        kinds = {str(one["type"]).rpartition(".")[2]: str(one["path"]) for one in modules}
    except (TypeError, KeyError) as error:
        raise WorkloadError(
            f"reading {path}", found=f"{type(error).__name__}: {error}", expected="a list of {type, path}"
        ) from error
    unknown = sorted(set(kinds) - MODULES)
    if unknown or "Pooling" not in kinds:
        raise WorkloadError(
            f"reading {path}",
            found=f"a model with {', '.join(unknown)}" if unknown else "a model without Pooling",
            expected=f"Transformer and Pooling, and Normalize or not: {MEAN}",
            fix="bring the model as a workload of kind 'custom', with its own forward pass",
        )
    _check_pooling_config(folder / kinds["Pooling"] / "config.json")


def _check_pooling_config(path: Path) -> None:
    config = read_object(path)
    if "pooling_mode" in config:  # sentence-transformers from 5 on
        found, right = repr(config["pooling_mode"]), config["pooling_mode"] in ("mean", ["mean"])
    else:
        flags = {MEAN: True} | {key: value for key, value in config.items() if key.startswith("pooling_mode_")}
        chosen = sorted(key for key, value in flags.items() if value)
        found, right = ", ".join(chosen) or "none", chosen == [MEAN]
    if not right:
        raise WorkloadError(
            f"reading {path}",
            found=f"pooling by {found}",
            expected=f"{MEAN} alone: the mean over the tokens",
            fix="bring the model as a workload of kind 'custom', with its own forward pass",
        )


def masked(tokenizer: tokenizers.Tokenizer, ids: Tensor) -> Tensor:
    """The same token ids with masks between the first and the last; with padding where there is no mask."""
    token = tokenizer.token_to_id("[MASK]")
    if token is None:
        token = tokenizer.token_to_id("<mask>")
    blank = ids.clone()
    blank[:, 1:-1] = token if token is not None else (tokenizer.padding or {}).get("pad_id", 0)
    return blank


def tokenized(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, (texts, longest) int64; the tokenizer pads, and truncates if it was told to."""
    encodings = tokenizer.encode_batch(texts)
    return {
        "input_ids": torch.tensor([encoding.ids for encoding in encodings], dtype=torch.int64),
        "attention_mask": torch.tensor([encoding.attention_mask for encoding in encodings], dtype=torch.int64),
    }


def text_input(tokenizer: tokenizers.Tokenizer, max_length: int) -> TextInput:
    """How a server makes the tokens that `tokenized` makes; `tokenizer` pads and truncates as it does for the model."""
    padding = tokenizer.padding or {}
    return TextInput(
        max_length=max_length, pad_id=padding.get("pad_id", 0), pad_token=padding.get("pad_token", "[PAD]")
    )


def input_digests(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> list[str]:
    """sha256 (hex) of what a model sees of each text: its token ids, cut as the tokenizer cuts, without padding."""
    digests = []
    for start in range(0, len(texts), ENCODED_AT_ONCE):
        for encoding in tokenizer.encode_batch(texts[start : start + ENCODED_AT_ONCE]):
            ids = [token for token, seen in zip(encoding.ids, encoding.attention_mask, strict=True) if seen]
            digests.append(hashlib.sha256(np.array(ids, dtype=np.int64).tobytes()).hexdigest())
    return digests


def mean_of_tokens(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """(batch, dim): the mean of hidden states, (batch, length, dim), over the tokens that are not padding."""
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)


def without_pooler(model: nn.Module) -> nn.Module:
    """The encoder without the layer whose output is not used; it would be exported and published."""
    if hasattr(model, "pooler"):
        model.register_module("pooler", None)
    return model
