"""Causal language modelling: a Hugging Face decoder, or a small one trained in the run, judged by log-likelihood."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from torch import Tensor, nn

from modelpress.config import TrainConfig, WorkloadConfig
from modelpress.errors import WorkloadError
from modelpress.progress import Progress, silent
from modelpress.workload import SPLITS, Batch, Split, Workload
from modelpress.workloads.hf_folder import (
    build_model,
    folder_digest,
    read_licence,
    read_model,
    read_number,
    read_token,
    read_tokenizer,
    resolve_folder,
)
from modelpress.workloads.sources import trained
from modelpress.workloads.text_corpus import SHARES, Blocks, load_texts, split_texts, train_tokenizer

TINY = "tiny-decoder"
TINY_SIZES: dict[str, int | float | bool] = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
"""Sizes of `tiny-decoder`, each of which `WorkloadConfig.architecture` may change; 1.05M parameters."""

TRAIN_BATCH = 8
LEARNING_RATE = 2e-3

MAX_LOGIT_BYTES = 2**27
"""Logits held at once while the model is judged."""


class Decoder(nn.Module):
    """A Hugging Face decoder without its cache: `input_ids`, (batch, length) int64, in; logits, (batch, length,
    vocabulary) float32, out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of the token that follows each position."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


class CausalLM(Workload):
    """A decoder and texts, cut into blocks of `WorkloadConfig.length` tokens: a sample is a block.

    The metric is a block's mean log-likelihood per token, in nats; e to the power of minus its mean is the perplexity.
    Beside it stands the share of tokens that the model guesses right.

    Raises:
        WorkloadError: the folder or the texts cannot be read, the texts are too few, the tokenizer has tokens that the
            model has not, or the blocks are longer than the model reads.
    """

    metric = "log_likelihood"

    def __init__(self, config: WorkloadConfig) -> None:
        self.config = config
        self.trains_source = config.model == TINY
        texts = load_texts(config.data)
        splits = split_texts(texts, config.data, config.seed)
        self.folder = None if self.trains_source else resolve_folder(config.model)
        if self.folder is None:
            self.sizes = _tiny_sizes({}, config.architecture)
            self.tokenizer = train_tokenizer(splits["train"], int(self.sizes["vocab_size"]))
            self.sizes["vocab_size"] = self.tokenizer.get_vocab_size()
            end: int | None = 0
        else:
            self.tokenizer = read_tokenizer(self.folder)
            self.tokenizer.no_padding()
            end = read_token(self.folder / "config.json", "eos_token_id")
            self._check_folder()
        self.vocab_size = self.tokenizer.get_vocab_size()
        self.end = end or 0
        self.evaluation_batch_size = max(1, min(64, MAX_LOGIT_BYTES // (4 * config.length * self.vocab_size)))
        self.blocks = _cut(splits, self.tokenizer, end, config)

    def _check_folder(self) -> None:
        assert self.folder is not None
        if self.config.architecture:
            raise WorkloadError(
                f"reading workload.architecture for {self.folder}",
                found=", ".join(sorted(self.config.architecture)),
                expected=f"none: only {TINY!r} is built from it, a folder has its own sizes",
            )
        known, longest = (
            read_number(self.folder / "config.json", key) for key in ("vocab_size", "max_position_embeddings")
        )
        tokens = self.tokenizer.get_vocab_size()
        if known is not None and tokens > known:
            raise WorkloadError(
                f"fitting the tokenizer of {self.folder} to its model",
                found=f"{tokens:,} tokens in tokenizer.json, vocab_size {known:,} in config.json",
                expected="no token that the model has no row for",
                fix="save the model and its own tokenizer into the same folder",
            )
        if longest is not None and self.config.length > longest:
            raise WorkloadError(
                f"cutting blocks for {self.folder}",
                found=f"workload.length {self.config.length}",
                expected=f"at most max_position_embeddings, {longest}",
            )

    def source(self, progress: Progress = silent) -> nn.Module:
        """The folder's weights in float32; or `tiny-decoder`, trained with AdamW from `WorkloadConfig.seed`."""
        if self.folder is not None:
            from transformers import AutoModelForCausalLM

            return Decoder(read_model(AutoModelForCausalLM, self.folder)).eval()
        training = TrainConfig(
            epochs=self.config.train_epochs,
            batch_size=TRAIN_BATCH,
            learning_rate=LEARNING_RATE,
            weight_decay=0.1,
            warmup_fraction=0.05,
            seed=self.config.seed,
        )
        return trained(self, lambda: self.skeleton({}), training, progress)

    def skeleton(self, architecture: Mapping[str, Any]) -> nn.Module:
        """An untrained decoder; `architecture` may change the sizes but not the vocabulary."""
        if "vocab_size" in architecture:
            raise WorkloadError(
                "building a decoder",
                found=f"vocab_size {architecture['vocab_size']} in its architecture",
                expected=f"no vocab_size: the tokenizer has {self.vocab_size} tokens, whatever the model's size",
            )
        if self.folder is not None:
            from transformers import AutoModelForCausalLM

            return Decoder(build_model(AutoModelForCausalLM, self.folder, architecture)).eval()
        return Decoder(_tiny_decoder(_tiny_sizes(self.sizes, architecture), self.config.length)).eval()

    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        """Batches of `input_ids`, (batch, length) int64; targets are the tokens that follow, of the same shape."""
        blocks = self.blocks[split]
        order = torch.arange(len(blocks))
        if seed is not None:
            order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
        for part in torch.split(order, batch_size) if len(order) else ():
            tokens = torch.from_numpy(blocks[part.numpy()]).long()
            yield Batch({"input_ids": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous())

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of the next token, the mean over all tokens."""
        if batch.targets is None:
            return super().loss(output, batch)
        return nn.functional.cross_entropy(output.flatten(0, 1), batch.targets.flatten())

    def condense(self, outputs: np.ndarray, batch: Batch) -> np.ndarray:
        """(batch, 2) float64: mean log-likelihood per token, and the share of tokens that are guessed right."""
        assert batch.targets is not None
        logits = torch.as_tensor(outputs).flatten(0, 1)
        targets = batch.targets.flatten()
        losses = nn.functional.cross_entropy(logits, targets, reduction="none").double()
        right = (logits.argmax(dim=-1) == targets).double()
        shape = batch.targets.shape
        return torch.stack([-losses.view(shape).mean(dim=1), right.view(shape).mean(dim=1)], dim=1).numpy()

    def score(self, outputs: np.ndarray) -> np.ndarray:
        """Mean log-likelihood per token of each block, nats. Outputs: what `condense` made, (blocks, 2)."""
        return outputs[:, 0]

    def further_scores(self, outputs: np.ndarray) -> dict[str, np.ndarray]:
        """`next_token_accuracy`: share of each block's tokens that are the model's first guess."""
        return {"next_token_accuracy": outputs[:, 1]}

    def shown(self, value: float) -> dict[str, float]:
        """`perplexity`: e^(−mean log-likelihood)."""
        return {"perplexity": math.exp(min(-value, 700.0))}

    def blank(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The token that ends a text in the place of all but the last one, which the answer follows."""
        ids = inputs["input_ids"].clone()
        ids[:, :-1] = self.end
        return {"input_ids": ids}

    def identity(self) -> str:
        """The config, and digests of the blocks, the tokenizer and the folder's files that count."""
        digest = hashlib.sha256(self.tokenizer.to_str().encode())
        digest.update((folder_digest(self.folder) if self.folder is not None else "").encode())
        for split in SPLITS:
            digest.update(split.encode() + self.blocks[split].tobytes())
        config = json.dumps(self.config.model_dump(mode="json", exclude={"model", "data"}), sort_keys=True)
        return f"causal-lm {config} {digest.hexdigest()}"

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Batch and length are free."""
        return {"input_ids": {0: "batch", 1: "length"}}

    def files(self) -> dict[str, bytes]:
        """`tokenizer.json`, and `decoder.json` with the length that the model was judged at."""
        facts = json.dumps({"length": self.config.length}, sort_keys=True)
        if self.folder is None:
            return {"tokenizer.json": self.tokenizer.to_str().encode(), "decoder.json": facts.encode()}
        return {"tokenizer.json": (self.folder / "tokenizer.json").read_bytes(), "decoder.json": facts.encode()}

    def weights(self) -> tuple[Path, str] | None:
        """The folder, where there is one; `Decoder` wraps its model."""
        return (self.folder, "model.") if self.folder is not None else None

    def licence(self) -> str:
        """The folder's; that of Python for a decoder trained on its sources."""
        if self.folder is not None:
            return read_licence(self.folder)
        return "PSF-2.0" if self.config.data == "python-sources" else "unknown"


def _tiny_sizes(sizes: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`TINY_SIZES`, changed twice.

    Raises:
        WorkloadError: an unknown size, or one that is no whole number from 1 up.
    """
    unknown = sorted(set(changes) - set(TINY_SIZES))
    wrong = sorted(
        key
        for key, value in changes.items()
        if key in TINY_SIZES and (type(value) is not type(TINY_SIZES[key]) or (value < 1 and value is not False))
    )
    if unknown or wrong:
        raise WorkloadError(
            f"building {TINY}",
            found=f"unknown {', '.join(unknown)}" if unknown else f"{wrong[0]} {changes[wrong[0]]!r}",
            expected=f"whole numbers from 1 up, some of {', '.join(TINY_SIZES)}",
        )
    found = {**TINY_SIZES, **sizes, **changes}
    if "num_attention_heads" in changes and "num_key_value_heads" not in changes:
        found["num_key_value_heads"] = changes["num_attention_heads"]
    heads, groups = found["num_attention_heads"], found["num_key_value_heads"]
    if found["hidden_size"] % (2 * heads) or heads % groups:
        raise WorkloadError(
            f"building {TINY}",
            found=f"hidden_size {found['hidden_size']}, {heads} heads, {groups} key-value heads",
            expected="a hidden_size that is an even number for each head, and heads a multiple of key-value heads",
        )
    return found


def _tiny_decoder(sizes: Mapping[str, Any], length: int) -> nn.Module:
    """A Llama (Touvron et al. 2023, arXiv:2302.13971): rotary positions, RMS norms, a gated feed-forward part."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes, max_position_embeddings=length, bos_token_id=0, eos_token_id=0, use_cache=False)
    config._attn_implementation = "eager"  # the leaner ONNX graph, and attention that can be looked at
    make: Any = LlamaForCausalLM
    model: nn.Module = make(config)
    return model


def _cut(
    splits: Mapping[Split, list[Any]], tokenizer: tokenizers.Tokenizer, end: int | None, config: WorkloadConfig
) -> dict[Split, np.ndarray]:
    limits: dict[Split, int] = {
        "evaluation": config.evaluation_samples,
        "calibration": config.calibration_samples,
        "train": config.train_samples,
    }
    cutter = Blocks(tokenizer, config.length, end)
    blocks = {split: cutter.cut(splits[split], limits[split]) for split in SHARES}
    empty = [split for split in SHARES if not len(blocks[split])]
    if empty:
        texts = sum(len(part) for part in splits.values())
        raise WorkloadError(
            f"cutting the texts of {config.data} into blocks of {config.length} tokens",
            found=f"{texts} distinct texts, and no block for {', '.join(empty)}",
            expected="a block in each split: a tenth of the text is for evaluation, a twentieth for calibration",
            fix="bring more text, or lower workload.length",
        )
    return blocks
