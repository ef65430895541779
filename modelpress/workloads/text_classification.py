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
from modelpress.process import Processing, Softmax, TopK
from modelpress.progress import Progress, silent
from modelpress.workload import SPLITS, Batch, Split, Workload
from modelpress.workloads.classes import MOST_CLASSES, by_class, check_numbers, check_trained
from modelpress.workloads.encoder_folder import (
    input_digests,
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
    read_object,
    read_padding,
    read_tokenizer,
    resolve_folder,
)
from modelpress.workloads.labelled_texts import SHARES, Labelled, distinct_inputs, load_labelled, split_labelled
from modelpress.workloads.sources import trained

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
        WorkloadError: the folder or the texts cannot be read, the texts are too few, a label is none of the folder's,
            or a class is never seen in training.
    """

    metric = "accuracy"

    def __init__(self, config: WorkloadConfig) -> None:
        self.config = config
        self.folder = resolve_folder(config.model)
        self.facts = read_object(self.folder / "config.json")
        self.trains_source = not self._architecture().endswith(CLASSIFIER)
        self.tokenizer = read_tokenizer(self.folder)
        self.max_length = min(config.length, read_max_length(self.folder))
        self.tokenizer.enable_truncation(self.max_length)
        texts = distinct_inputs(load_labelled(config.data), self.tokenizer, config.data)
        self.labels = self._known_labels(texts)
        limits: dict[Split, int] = {
            "evaluation": config.evaluation_samples,
            "calibration": config.calibration_samples,
            "train": config.train_samples,
        }
        splits = split_labelled(texts, config.data, config.seed)
        self.texts = {split: splits[split][: limits[split] or None] for split in SHARES}
        if self.trains_source:
            check_trained(self.labels, {self._number(one.label) for one in self.texts["train"]}, config.data)
        # Padding costs time: what is judged goes from the shortest text to the longest.
        self.texts["evaluation"].sort(key=lambda one: len(one.text))

    def _architecture(self) -> str:
        """The first class that config.json names; empty where it names none."""
        named = self.facts.get("architectures")
        if named is not None and not (isinstance(named, list) and all(isinstance(one, str) for one in named)):
            raise WorkloadError(
                f"reading architectures of {self.folder / 'config.json'}",
                found=repr(named)[:80],
                expected="a list of names of classes",
            )
        return named[0] if named else ""

    def _stated_labels(self) -> list[str]:
        """Names of a ready classifier's classes in the order of its logits; transformers' default is two."""
        stated = self.facts.get("id2label")
        if stated is None:
            return ["0", "1"]
        numbers = list(map(str, range(len(stated)))) if isinstance(stated, dict) else []
        if not numbers or set(stated) != set(numbers) or not all(isinstance(name, str) for name in stated.values()):
            raise WorkloadError(
                f"reading id2label of {self.folder / 'config.json'}",
                found=repr(stated)[:80],
                expected='a name for each number from 0 up: {"0": "…", "1": "…"}',
            )
        return [stated[number] for number in numbers]

    def _known_labels(self, texts: list[Labelled]) -> list[str]:
        """Names of the classes in the order of the logits."""
        found = sorted({one.label for one in texts}, key=str)
        numbered = isinstance(found[0], int)
        if self.trains_source:
            if numbered:
                check_numbers([int(label) for label in found], self.config.data)
            return [str(number) for number in range(len(found))] if numbered else [str(label) for label in found]
        known = self._stated_labels()
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
            return Classifier(self._padded(read_model(AutoModelForSequenceClassification, self.folder))).eval()
        training = TrainConfig(
            epochs=self.config.train_epochs,
            batch_size=TRAIN_BATCH,
            learning_rate=LEARNING_RATE,
            weight_decay=0.01,
            warmup_fraction=0.1,
            seed=self.config.seed,
        )
        return trained(self, lambda: self._headed(read_model(AutoModel, self.folder)), training, progress)

    def skeleton(self, architecture: Mapping[str, Any]) -> nn.Module:
        """The same model without its weights; `architecture` may change number keys of its config.json."""
        from transformers import AutoModel, AutoModelForSequenceClassification

        if not self.trains_source:
            model = build_model(AutoModelForSequenceClassification, self.folder, architecture)
            return Classifier(self._padded(model)).eval()
        return self._headed(build_model(AutoModel, self.folder, architecture)).eval()

    def _padded(self, model: nn.Module) -> nn.Module:
        """The classifier, which knows what pads: a decoder's answer is read at the last token that does not."""
        config: Any = model.config
        if config.pad_token_id is None:
            config.pad_token_id = read_padding(self.folder)
        if config.pad_token_id is None:
            raise WorkloadError(
                f"loading the classifier of {self.folder}",
                found="no padding token, neither pad_token_id in config.json nor padding in tokenizer.json",
                expected="the token that fills up the shorter texts of a batch",
                fix="set pad_token_id in config.json to a token that no text ends with",
            )
        return model

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

    def slices(self) -> dict[str, np.ndarray]:
        """The texts of each class, where the config asks for them."""
        if not self.config.slice_by_class:
            return {}
        return by_class(self.labels, [self._number(one.label) for one in self.texts["evaluation"]])

    def identity(self) -> str:
        """The config, and digests of the folder's files that count, of the texts and of the names of the classes."""
        digest = hashlib.sha256(folder_digest(self.folder).encode())
        for split in SPLITS:
            digest.update("".join([split, *[f"{one.digest} {one.label}" for one in self.texts[split]]]).encode())
        digest.update(json.dumps(self.labels).encode())
        config = json.dumps(self.config.model_dump(mode="json", exclude={"model", "data"}), sort_keys=True)
        return f"text-classification {config} {digest.hexdigest()}"

    def blank(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks in the place of all tokens between the first and the last; padding where there is no mask."""
        return {"input_ids": masked(self.tokenizer, inputs["input_ids"])}

    def sample_digests(self, split: Split) -> set[str]:
        """sha256 of each text's tokens: padding, which depends on a text's neighbours in its batch, does not count."""
        return set(input_digests(self.tokenizer, [one.text for one in self.texts[split]]))

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

    def processing(self) -> Processing:
        """Texts in, the likeliest classes out, by name."""
        steps = (Softmax(of=self.output_name), TopK(of="probabilities", k=min(MOST_CLASSES, len(self.labels))))
        return Processing(input=text_input(self.tokenizer, self.max_length), steps=steps)

    def licence(self) -> str:
        """The `license` line of the folder's model card."""
        return read_licence(self.folder)
