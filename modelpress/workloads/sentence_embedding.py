"""Sentence embedding: a Hugging Face encoder folder, judged by retrieval (mean reciprocal rank)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from modelpress.config import WorkloadConfig
from modelpress.errors import WorkloadError
from modelpress.process import Processing
from modelpress.progress import Progress, silent
from modelpress.workload import SPLITS, Batch, Outputs, Split, Workload
from modelpress.workloads.encoder_folder import (
    check_pooling,
    masked,
    mean_of_tokens,
    read_max_length,
    text_input,
    tokenized,
    without_pooler,
)
from modelpress.workloads.hf_folder import (
    build_model,
    folder_digest,
    read_licence,
    read_model,
    read_tokenizer,
    resolve_folder,
)
from modelpress.workloads.retrieval_pairs import Pair, load_pairs

SHARES: dict[Split, float] = {"evaluation": 0.5, "calibration": 0.1, "train": 0.4}
"""How the pairs are divided before `WorkloadConfig` limits each split: limits never move a pair between splits."""

CONTRASTIVE_TEMPERATURE = 0.05

SCORE_BLOCK = 512
"""Queries that are compared with all documents at once."""


class SentenceEncoder(nn.Module):
    """A Hugging Face encoder, the mean over the tokens that are not padding, and L2 normalisation.

    Takes `input_ids` and `attention_mask`, (batch, length) int64; returns (batch, dim) float32 of length 1.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings of a batch of token sequences."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return nn.functional.normalize(mean_of_tokens(hidden, attention_mask), dim=-1)


class SentenceEmbedding(Workload):
    """A Hugging Face folder (safetensors, config, tokenizer.json) and retrieval pairs.

    A sample of the config's limits is a pair: a query and its document. On the evaluation split each query is ranked
    against all evaluation documents. Training batches hold both texts of each pair; `Batch.targets` numbers the pairs.

    Raises:
        WorkloadError: the folder or the pairs cannot be read, the folder pools otherwise than by the mean, or the
            pairs are too few.
    """

    metric = "mrr"
    outputs: ClassVar[Outputs] = "embeddings"
    samples_stand_alone = False  # each text is told apart from all others of its batch

    def __init__(self, config: WorkloadConfig) -> None:
        self.config = config
        self.folder = resolve_folder(config.model)
        check_pooling(self.folder)
        self.max_length = read_max_length(self.folder)
        self.tokenizer = read_tokenizer(self.folder)
        self.tokenizer.enable_truncation(self.max_length)
        self.pairs = _split_pairs(load_pairs(config.data), config)

    def source(self, progress: Progress = silent) -> nn.Module:  # noqa: ARG002
        """The folder's weights, in float32; nothing is fetched from anywhere."""
        from transformers import AutoModel

        return SentenceEncoder(without_pooler(read_model(AutoModel, self.folder))).eval()

    def skeleton(self, architecture: Mapping[str, Any]) -> nn.Module:
        """The folder's model without its weights; `architecture` may change number keys of its config.json."""
        from transformers import AutoModel

        return SentenceEncoder(without_pooler(build_model(AutoModel, self.folder, architecture))).eval()

    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        """Batches of token ids, padded to their longest text.

        With a seed: whole pairs, shuffled, their numbers as targets (an odd `batch_size` is rounded down, 1 up).
        Without: texts, each on its own, on the evaluation split from the shortest to the longest.
        """
        if seed is None:
            texts = self._texts(split)
            for start in range(0, len(texts), batch_size):
                yield Batch(self.tokenize(texts[start : start + batch_size]))
            return
        pairs = self.pairs[split]
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
        for part in torch.split(order, max(1, batch_size // 2)):
            chosen = [pairs[index] for index in part.tolist()]
            texts = [pair.query for pair in chosen] + [pair.document for pair in chosen]
            yield Batch(self.tokenize(texts), torch.cat([part, part]))

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, (texts, longest) int64, at most `max_length` tokens each."""
        return tokenized(self.tokenizer, texts)

    def score(self, outputs: np.ndarray) -> np.ndarray:
        """1 ÷ rank of each query's document among all evaluation documents, (queries,).

        A document that scores the same as the right one counts before it: equal embeddings are no success.
        Outputs: (2 · queries, dim), in the order of `batches("evaluation", …)`.
        """
        pairs = self.pairs["evaluation"]
        embeddings = np.empty_like(outputs)
        embeddings[self._evaluation_order()] = outputs
        queries, documents = embeddings[: len(pairs)], embeddings[len(pairs) :]
        scores = np.empty(len(pairs), dtype=np.float64)
        for start in range(0, len(pairs), SCORE_BLOCK):
            similarity = queries[start : start + SCORE_BLOCK] @ documents.T
            rows = np.arange(len(similarity))
            right = similarity[rows, start + rows]
            # Written as "not below" so that NaN counts against the model.
            scores[start + rows] = 1.0 / (~(similarity < right[:, None])).sum(axis=1)
        return scores

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Contrastive: each query must find its document among the batch's, and the other way round.

        InfoNCE with in-batch negatives (van den Oord et al. 2018, arXiv:1807.03748), symmetric.
        """
        if batch.targets is None or not torch.equal(*batch.targets.chunk(2)):
            raise WorkloadError(
                "computing the contrastive loss", found="a batch without pairs", expected="a batch made with a seed"
            )
        queries, documents = output.chunk(2)
        similarity = queries @ documents.T / CONTRASTIVE_TEMPERATURE
        right = torch.arange(len(queries), device=output.device)
        return (nn.functional.cross_entropy(similarity, right) + nn.functional.cross_entropy(similarity.T, right)) / 2

    def identity(self) -> str:
        """The config, and digests of the folder's files that count and of the pairs."""
        digest = hashlib.sha256(folder_digest(self.folder).encode())
        for split in SPLITS:
            digest.update("".join([split, *[pair.digest for pair in self.pairs[split]]]).encode())
        config = json.dumps(self.config.model_dump(mode="json", exclude={"model"}), sort_keys=True)
        return f"sentence-embedding {config} {digest.hexdigest()}"

    def blank(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks in the place of all tokens between the first and the last; padding where there is no mask."""
        return {"input_ids": masked(self.tokenizer, inputs["input_ids"])}

    def sample_digests(self, split: Split) -> set[str]:
        """sha256 of each text: padding, which depends on a text's neighbours in its batch, does not count."""
        return {hashlib.sha256(text.encode()).hexdigest() for text in self._texts(split)}

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Batch and length are free."""
        return {name: {0: "batch", 1: "length"} for name in ("input_ids", "attention_mask")}

    def files(self) -> dict[str, bytes]:
        """`tokenizer.json`, and `encoder.json` with what else a client needs to make and read requests."""
        facts = {"max_length": self.max_length, "pooling": "mean", "normalized": True}
        tokenizer = (self.folder / "tokenizer.json").read_bytes()
        return {"tokenizer.json": tokenizer, "encoder.json": json.dumps(facts, sort_keys=True).encode()}

    def processing(self) -> Processing:
        """Texts in, embeddings out: the tokens of `tokenize`; the graph itself pools and normalises."""
        return Processing(input=text_input(self.tokenizer, self.max_length))

    def licence(self) -> str:
        """The `license` line of the folder's model card."""
        return read_licence(self.folder)

    def _texts(self, split: Split) -> list[str]:
        """All queries, then all documents; on the evaluation split sorted by length, as padding costs time."""
        texts = [pair.query for pair in self.pairs[split]] + [pair.document for pair in self.pairs[split]]
        return [texts[index] for index in self._evaluation_order()] if split == "evaluation" else texts

    def _evaluation_order(self) -> list[int]:
        pairs = self.pairs["evaluation"]
        lengths = [len(pair.query) for pair in pairs] + [len(pair.document) for pair in pairs]
        return sorted(range(len(lengths)), key=lengths.__getitem__)


def _split_pairs(pairs: tuple[Pair, ...], config: WorkloadConfig) -> dict[Split, tuple[Pair, ...]]:
    """Cut the pairs by `SHARES`, rotated by the seed, then shorten each split to the config's limits."""
    offset = config.seed * 7919 % max(1, len(pairs))
    rotated = pairs[offset:] + pairs[:offset]
    limits: dict[Split, int] = {
        "evaluation": config.evaluation_samples,
        "calibration": config.calibration_samples,
        "train": config.train_samples,
    }
    splits: dict[Split, tuple[Pair, ...]] = {}
    start = 0.0
    for split, share in SHARES.items():
        part = rotated[round(start * len(pairs)) : round((start + share) * len(pairs))]
        splits[split] = part[: limits[split] or None]
        start += share
    if not all(splits.values()):
        raise WorkloadError(
            f"splitting the pairs of {config.data}",
            found=f"{len(pairs)} distinct pairs",
            expected="at least 10: half for evaluation, a tenth for calibration, the rest for training",
        )
    return splits
