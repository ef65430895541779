"""The losses of language models and of what goes on inside a model, against formulas written out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modelpress.distill.losses import Divergence, attention_loss, feature_map_loss, imitation_loss

BOTH: list[Divergence] = ["forward-kl", "reverse-kl"]


def logits(seed: int, *shape: int, scale: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


@pytest.mark.parametrize("divergence", BOTH)
@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), temperature=st.floats(0.5, 8))
def test_each_token_counts_once(divergence: Divergence, seed: int, temperature: float) -> None:
    student, teacher = logits(seed, 2, 3, 5), logits(seed + 1, 2, 3, 5)
    q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    one, other = (p, q) if divergence == "forward-kl" else (q, p)
    rows = [(one[i, j] * (one[i, j] / other[i, j]).log()).sum() for i in range(2) for j in range(3)]
    by_hand = temperature**2 * sum(float(row) for row in rows) / 6
    found = imitation_loss(student, teacher, "logits", temperature, divergence)
    assert float(found) == pytest.approx(by_hand, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("divergence", BOTH)
def test_the_loss_and_its_gradient_are_zero_only_where_the_distributions_are_equal(divergence: Divergence) -> None:
    teacher = logits(0, 2, 3, 5)
    for shift, equal in ((0.0, True), (7.5, True), (None, False)):
        student = (teacher + shift if shift is not None else logits(1, 2, 3, 5)).requires_grad_()
        loss = imitation_loss(student, teacher, "logits", 2.0, divergence)
        loss.backward()
        assert student.grad is not None
        assert (float(loss.detach()) == pytest.approx(0, abs=1e-12)) == equal
        assert (float(student.grad.abs().max()) < 1e-9) == equal


@pytest.mark.parametrize("divergence", BOTH)
def test_the_gradient_keeps_its_size_when_the_temperature_rises(divergence: Divergence) -> None:
    """At high temperature both tend to (z − v)/N of centred logits, per token (Hinton et al., 2.1)."""
    teacher = logits(0, 1, 2, 4, scale=1.0)
    teacher -= teacher.mean(-1, keepdim=True)
    for temperature in (100.0, 1000.0):
        student = logits(1, 1, 2, 4, scale=1.0)
        student = (student - student.mean(-1, keepdim=True)).requires_grad_()
        imitation_loss(student, teacher, "logits", temperature, divergence).backward()
        assert student.grad is not None
        assert torch.allclose(student.grad, (student.detach() - teacher) / 4 / 2, atol=0.01)


def test_forward_covers_and_reverse_seeks() -> None:
    """A teacher with two peaks: a student with one of them loses more by forward-kl than by reverse-kl."""
    teacher = torch.tensor([[4.0, 0.0, 4.0]], dtype=torch.float64)
    peak, bridge = torch.tensor([[8.0, 0.0, 0.0]]).double(), torch.zeros(1, 3).double()
    forward = [float(imitation_loss(one, teacher, "logits", 1.0, "forward-kl")) for one in (peak, bridge)]
    reverse = [float(imitation_loss(one, teacher, "logits", 1.0, "reverse-kl")) for one in (peak, bridge)]
    assert forward[0] > forward[1]
    assert forward[0] / forward[1] > 3 * reverse[0] / reverse[1]


def test_padding_does_not_count() -> None:
    student, teacher = logits(0, 2, 3, 5), logits(1, 2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    kept = mask.bool()
    expected = imitation_loss(student[kept], teacher[kept], "logits", 2.0)
    student[~kept] = 1e4
    assert float(imitation_loss(student, teacher, "logits", 2.0, mask=mask)) == pytest.approx(float(expected))


def test_attention_is_compared_row_by_row_and_zeros_are_no_trouble() -> None:
    taught = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]], [[1.0, 0.0], [0.5, 0.5]]]])
    learned = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [0.5, 0.5]]]], requires_grad=True)
    row = 0.25 * torch.tensor(0.5).log() + 0.75 * torch.tensor(1.5).log()
    found = attention_loss(taught, learned)
    assert float(found.detach()) == pytest.approx(float(row) / 2 / 2, rel=1e-5)
    found.backward()
    assert learned.grad is not None
    assert torch.isfinite(learned.grad).all()
    masked = attention_loss(taught, learned, torch.tensor([[1, 0]]))
    assert float(masked.detach()) == pytest.approx(0.0, abs=1e-7)


def test_feature_maps_are_compared_by_where_they_look() -> None:
    taught = torch.zeros(1, 3, 2, 2)
    taught[0, :, 0, 0] = 5.0
    same, other = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    same[0, 1, 0, 0] = -0.1
    other[0, 0, 1, 1] = 1.0
    assert float(feature_map_loss({(2, 2): taught}, {(2, 2): same})) == pytest.approx(0.0, abs=1e-6)
    assert float(feature_map_loss({(2, 2): taught}, {(2, 2): other})) == pytest.approx(2.0)
    both = feature_map_loss({(2, 2): taught, (4, 4): taught}, {(2, 2): other, (3, 3): other})
    assert float(both) == pytest.approx(2.0)


def test_a_students_other_vocabulary_is_refused() -> None:
    from modelpress.errors import StageError

    with pytest.raises(StageError, match=r"(?s)\[2, 3, 5\], the teacher's \[2, 3, 6\]"):
        imitation_loss(logits(0, 2, 3, 5), logits(1, 2, 3, 6), "logits")
