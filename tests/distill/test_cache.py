"""Cached answers of the teacher: the whole KL where all classes are kept, a lower bound where not, found by content."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from modelpress.config import DistillConfig, TrainConfig, WorkloadConfig
from modelpress.distill import cache as cache_module
from modelpress.distill import distill, distillation_loss, frozen, imitation_loss
from modelpress.distill.cache import TeacherCache
from modelpress.distill.losses import Divergence
from modelpress.errors import StageError
from modelpress.progress import silent
from modelpress.workload import Batch, Split
from modelpress.workloads.causal_lm import CausalLM
from modelpress.workloads.image_classification import ImageClassification
from tests.decoders import SIZES, make_text_folder
from tests.train.toy import Toy


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    texts = make_text_folder(tmp_path_factory.mktemp("texts"))
    return CausalLM(
        WorkloadConfig(
            kind="causal-lm", model="tiny-decoder", data=str(texts), length=16, architecture=SIZES, train_samples=40,
            calibration_samples=8, evaluation_samples=8,
        )
    )  # fmt: skip


def config_of(top_k: int, **changes: object) -> DistillConfig:
    return DistillConfig.model_validate({"cache_top_k": top_k, "alpha": 1.0, "temperature": 2.0, **changes})


@pytest.mark.parametrize("divergence", ["forward-kl", "reverse-kl"])
def test_with_all_classes_it_is_the_whole_divergence(language: CausalLM, divergence: Divergence) -> None:
    teacher, student = language.skeleton({}), language.skeleton({"num_hidden_layers": 1})
    losses = []
    for top_k in (language.vocab_size, language.vocab_size * 2, 64, 8, 1):
        cache = TeacherCache(teacher, language, config_of(top_k), silent)
        total, batches = 0.0, 0
        for batch in language.batches("train", 10, seed=5):  # another order and other batches
            with torch.no_grad():
                total += float(cache.loss(student(**batch.inputs), batch, divergence))
            batches += 1
        losses.append(total / batches)
    with torch.no_grad():
        whole = sum(
            float(imitation_loss(student(**b.inputs), teacher(**b.inputs), "logits", 2.0, divergence))
            for b in language.batches("train", 10, seed=5)
        )
    assert losses[0] == losses[1] == pytest.approx(whole / batches, rel=2e-2)
    assert losses[0] > losses[2] > losses[3] > losses[4] > 0


def test_the_gradient_is_the_whole_divergences(language: CausalLM) -> None:
    torch.manual_seed(0)
    teacher = language.skeleton({})
    teacher.model.lm_head.weight.data *= 20  # answers that differ between classes
    batch = next(language.batches("train", 4))
    output = torch.randn(4, 16, language.vocab_size, requires_grad=True)
    cached = TeacherCache(teacher, language, config_of(language.vocab_size), silent)
    (own,) = torch.autograd.grad(cached.loss(output, batch, "forward-kl"), output)
    whole = imitation_loss(output, teacher(**batch.inputs).detach(), "logits", 2.0)
    (expected,) = torch.autograd.grad(whole, output)
    assert torch.allclose(own, expected, atol=2e-5)
    for divergence in ("forward-kl", "reverse-kl"):
        few = TeacherCache(teacher, language, config_of(4), silent)
        (gradient,) = torch.autograd.grad(few.loss(output, batch, divergence), output)
        assert torch.isfinite(gradient).all()


def test_the_teacher_runs_once(language: CausalLM) -> None:
    teacher = language.skeleton({})
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    train = TrainConfig(epochs=3, batch_size=8)
    _, report = distill(teacher, language, config_of(16, architecture={"num_hidden_layers": 1}, train=train))
    assert len(calls) == 5  # forty blocks, eight at a time
    assert report.train.updates == 15
    assert report.cache_bytes == 40 * 16 * (16 * 6 + 4)


def test_calibration_batches_are_answered_by_the_teacher_itself(language: CausalLM) -> None:
    teacher, student = language.skeleton({}), language.skeleton({"num_hidden_layers": 1}).eval()
    config = config_of(16)
    cache = TeacherCache(teacher, language, config, silent)
    batch = next(language.batches("calibration", 8))
    with torch.no_grad():
        cached = distillation_loss(teacher, language, config, cache=cache)(student, batch)
        plain = distillation_loss(teacher, language, config)(student, batch)
    assert float(cached) == float(plain)
    with pytest.raises(StageError, match="8 samples of 8"):
        distillation_loss(teacher, language, config, cache=cache)(student.train(), batch)


def test_classifiers_are_cached_too() -> None:
    workload = Toy()
    config = config_of(3, architecture={"width": 5}, train=TrainConfig(epochs=30, batch_size=16))
    plain = config.model_copy(update={"cache_top_k": 0})
    cached, whole = (distill(workload.source(), workload, one)[1].train.final_loss for one in (config, plain))
    assert cached == pytest.approx(whole, rel=0.02)


def test_augmented_inputs_are_refused_by_name() -> None:
    workload = ImageClassification(
        WorkloadConfig(kind="image-classification", model="digits-cnn", data="digits", train_samples=60)
    )
    config = config_of(4, architecture={"channels": [4], "hidden": 8}, train=TrainConfig(epochs=1))
    with pytest.raises(StageError, match=r"(?s)60 samples of 60.*augmentation.*cache_top_k"):
        distill(workload.skeleton({}), workload, config)


def test_what_cannot_be_cached_is_refused(language: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = language.skeleton({})
    monkeypatch.setattr(cache_module, "MAX_CACHE_BYTES", 1000)
    with pytest.raises(StageError, match=r"(?s)64,000 bytes.*1,000.*cache_top_k"):
        TeacherCache(teacher, language, config_of(16), silent)
    with pytest.raises(StageError, match="embeddings"):
        TeacherCache(nn.Linear(4, 3), Toy(outputs="embeddings"), config_of(2), silent)
    broken = Toy()
    broken.x[3] = torch.nan
    with pytest.raises(StageError, match="3 not finite"):
        TeacherCache(broken.source(), broken, config_of(2), silent)


def test_lengths_that_differ_are_refused(language: CausalLM) -> None:
    class Uneven(CausalLM):
        def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
            for number, batch in enumerate(super().batches(split, batch_size, seed)):
                yield batch if not number else Batch({"input_ids": batch.inputs["input_ids"][:, :9]})

    uneven = Uneven(language.config)
    with frozen(language.skeleton({})) as teacher, pytest.raises(StageError, match=r"16\] places"):
        TeacherCache(teacher, uneven, config_of(4, train=TrainConfig(batch_size=8)), silent)


def test_a_padded_token_is_not_asked_for(tmp_path: Path) -> None:
    class Masked(Toy):
        def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
            x = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))
            yield Batch({"x": x, "attention_mask": torch.tensor([[1, 1, 0, 0]] * 6)})

    workload = Masked()
    cache = TeacherCache(_Echo(), workload, config_of(3), silent)
    batch = next(workload.batches("train", 6))
    mask, output = batch.inputs["attention_mask"], torch.zeros(6, 4, 3)
    expected = imitation_loss(output, batch.inputs["x"], "logits", 2.0, mask=mask)
    assert float(cache.loss(output, batch, "forward-kl", mask)) == pytest.approx(float(expected), rel=1e-2)


class _Echo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return x * self.one
