"""The built-in workloads, by `WorkloadConfig.kind`."""

from __future__ import annotations

from collections.abc import Callable

from modelpress.config import WorkloadConfig
from modelpress.workload import Workload
from modelpress.workloads.causal_lm import CausalLM
from modelpress.workloads.image_classification import ImageClassification
from modelpress.workloads.sentence_embedding import SentenceEmbedding
from modelpress.workloads.text_classification import TextClassification

BUILT_IN: dict[str, Callable[[WorkloadConfig], Workload]] = {
    "image-classification": ImageClassification,
    "text-classification": TextClassification,
    "sentence-embedding": SentenceEmbedding,
    "causal-lm": CausalLM,
}
