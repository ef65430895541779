"""Text classification: a Hugging Face classifier, or an encoder with a new head trained in the run; accuracy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelpress.config import TrainConfig, WorkloadConfig
from modelpress.errors import WorkloadError
from modelpress.progress import Progress, silent
from modelpress.train import train_
from modelpress.workload import SPLITS, Batch, Split, Workload
from modelpress.workloads.encoder_folder import masked, mean_of_tokens, read_max_length, tokenized, without_pooler
from modelpress.workloads.hf_folder import (
    build_model,
    folder_digest,
    read_licence,
    read_model,
    read_object,
    read_tokenizer,
    resolve_folder,
)
from modelpress.workloads.labelled_texts import SHARES, Labelled, load_labelled, split_labelled

CLASSIFIER = "ForSequenceClassification"
TRAIN_BATCH = 32
LEARNING_RATE = 2e-4


class HeadedEncoder(nn.Module):
    """A Hugging Face encoder, the mean over the tokens that are not padding, and a linear layer.

    Takes `input_ids` and `attention_mask`, (batch, length) int64; returns logits, (batch, classes) float32.
    """

    def __init__(self, model: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of a batch of token sequences."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits: Tensor = self.head(mean_of_tokens(hidden, attention_mask))
        return logits


class Classifier(nn.Module):
    """A model that transformers calls `…ForSequenceClassification`; inputs and output as `HeadedEncoder`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of a batch of token sequences."""
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


class TextClassification(Workload):
    """A Hugging Face folder and labelled texts.

    A folder whose config.json names a `…ForSequenceClassification` is taken as it is, with its own labels. Any other
    is an encoder: it gets a new linear head, and both are trained in the run.

    Raises:
        WorkloadError: the folder or the texts cannot be read, the texts are too few, or a label is none of the
            folder's.
    """

    metric = "accuracy"

    def __init__(self, config: WorkloadConfig) -> None:
        self.config = config
        self.folder = resolve_folder(config.model)
        self.facts = read_object(self.folder / "config.json")
        named = self.facts.get("architectures") or [""]
        self.trains_source = not str(named[0]).endswith(CLASSIFIER)
        self.tokenizer = read_tokenizer(self.folder)
        self.max_length = min(config.length, read_max_length(self.folder))
        self.tokenizer.enable_truncation(self.max_length)
        texts = load_labelled(config.data)
        self.labels = self._known_labels(texts)
        limits: dict[Split, int] = {
            "evaluation": config.evaluation_samples,
            "calibration": config.calibration_samples,
            "train": config.train_samples,
        }
        splits = split_labelled(texts, config.data, config.seed)
        self.texts = {split: splits[split][: limits[split] or None] for split in SHARES}
        # Padding costs time: what is judged goes from the shortest text to the longest.
        self.texts["evaluation"].sort(key=lambda one: len(one.text))

    def _known_labels(self, texts: list[Labelled]) -> list[str]:
        """Names of the classes in the order of the logits."""
        found = sorted({one.label for one in texts}, key=str)
        numbered = isinstance(found[0], int)
        if self.trains_source:
            most = max(int(label) for label in found) + 1 if numbered else 0
            if numbered and most > len(found):
                missing = sorted(set(range(most)) - {int(label) for label in found})
                raise WorkloadError(
                    f"numbering the classes of {self.config.data}",
                    found=f"classes up to {most - 1}, and no text of {missing[:5]}",
                    expected="texts of every class from 0 up",
                )
            return [str(number) for number in range(most)] if numbered else [str(label) for label in found]
        names = {int(key): str(name) for key, name in (self.facts.get("id2label") or {0: "0", 1: "1"}).items()}
        known = [names[number] for number in sorted(names)]
        unknown = [label for label in found if (label not in range(len(known)) if numbered else label not in known)]
        if unknown:
            raise WorkloadError(
                f"fitting the labels of {self.config.data} to {self.folder}",
                found=f"{unknown[0]!r}",
                expected=f"numbers below {len(known)}, or names among {', '.join(known[:10])}",
                fix="rename the labels as the model's config.json has them in id2label",
            )
        return known

    def _number(self, label: str | int) -> int:
        return label if isinstance(label, int) else self.labels.index(label)

    def source(self, progress: Progress = silent) -> nn.Module:
        """The folder's classifier; or its encoder and a head, trained with AdamW from `WorkloadConfig.seed`."""
        from transformers import AutoModel, AutoModelForSequenceClassification

        if not self.trains_source:
            return Classifier(read_model(AutoModelForSequenceClassification, self.folder)).eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            module = self._headed(read_model(AutoModel, self.folder))
        training = TrainConfig(
            epochs=self.config.train_epochs,
            batch_size=TRAIN_BATCH,
            learning_rate=LEARNING_RATE,
            weight_decay=0.01,
            warmup_fraction=0.1,
            seed=self.config.seed,
        )
        train_(module, lambda model, batch: self.loss(model(**batch.inputs), batch), self, training, progress)
        return module.eval()

    def skeleton(self, architecture: Mapping[str, Any]) -> nn.Module:
        """The same model without its weights; `architecture` may change number keys of its config.json."""
        from transformers import AutoModel, AutoModelForSequenceClassification

        if not self.trains_source:
            return Classifier(build_model(AutoModelForSequenceClassification, self.folder, architecture)).eval()
        return self._headed(build_model(AutoModel, self.folder, architecture)).eval()

    def _headed(self, model: nn.Module) -> nn.Module:
        width: int = model.config.hidden_size  # type: ignore[union-attr, assignment]
        return HeadedEncoder(without_pooler(model), width, len(self.labels))

    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        """Batches of token ids, padded to their longest text, with targets (batch,) int64."""
        texts = self.texts[split]
        order = torch.arange(len(texts))
        if seed is not None:
            order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
        for part in torch.split(order, batch_size):
            chosen = [texts[index] for index in part.tolist()]
            targets = torch.tensor([self._number(one.label) for one in chosen])
            yield Batch(tokenized(self.tokenizer, [one.text for one in chosen]), targets)

    def score(self, outputs: np.ndarray) -> np.ndarray:
        """1 where the largest logit is the label's, else 0. Outputs: (evaluation samples, classes)."""
        labels = np.array([self._number(one.label) for one in self.texts["evaluation"]])
        return np.asarray(outputs.argmax(axis=1) == labels, dtype=np.float64)

    def identity(self) -> str:
        """The config, and digests of the folder's files that count and of the texts."""
        digest = hashlib.sha256(folder_digest(self.folder).encode())
        for split in SPLITS:
            digest.update("".join([split, *[f"{one.digest} {one.label}" for one in self.texts[split]]]).encode())
        config = json.dumps(self.config.model_dump(mode="json", exclude={"model", "data"}), sort_keys=True)
        return f"text-classification {config} {digest.hexdigest()}"

    def blank(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks in the place of all tokens between the first and the last; padding where there is no mask."""
        return {"input_ids": masked(self.tokenizer, inputs["input_ids"])}

    def sample_digests(self, split: Split) -> set[str]:
        """sha256 of each text: padding, which depends on a text's neighbours in its batch, does not count."""
        return {one.digest for one in self.texts[split]}

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Batch and length are free."""
        return {name: {0: "batch", 1: "length"} for name in ("input_ids", "attention_mask")}

    def files(self) -> dict[str, bytes]:
        """`tokenizer.json`, `labels.json` in the order of the logits, and `encoder.json` with the longest text."""
        return {
            "tokenizer.json": (self.folder / "tokenizer.json").read_bytes(),
            "labels.json": json.dumps(self.labels).encode(),
            "encoder.json": json.dumps({"max_length": self.max_length}).encode(),
        }

    def licence(self) -> str:
        """The `license` line of the folder's model card."""
        return read_licence(self.folder)
