"""Distillation: the loss is the paper's, the teacher is not touched, the student is what was asked for."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from modelpress.config import DistillConfig, TrainConfig
from modelpress.distill import (
    distill,
    distillation_loss,
    frozen,
    hidden_loss,
    imitation_loss,
    layer_list,
    make_student,
    matched,
    recorded,
)
from modelpress.errors import StageError, WorkloadError
from modelpress.workload import Batch, Outputs
from tests.train.toy import Toy, mlp


class Stack(nn.Module):
    """Layers in a list, as encoders have them; some return tuples."""

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(layers))
        self.heads = nn.ModuleList([nn.Linear(4, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.heads[0](x)


def by_hand(student: list[list[float]], teacher: list[list[float]], temperature: float) -> float:
    total = 0.0
    for own, taught in zip(student, teacher, strict=True):
        p = [math.exp(value / temperature) for value in taught]
        q = [math.exp(value / temperature) for value in own]
        for a, b in zip(p, q, strict=True):
            total += a / sum(p) * (math.log(a / sum(p)) - math.log(b / sum(q)))
    return temperature**2 * total / len(student)


logits = st.lists(st.lists(st.floats(-8, 8), min_size=3, max_size=3), min_size=2, max_size=2)


@given(student=logits, teacher=logits, temperature=st.floats(0.5, 10))
def test_soft_label_loss_is_the_papers(
    student: list[list[float]], teacher: list[list[float]], temperature: float
) -> None:
    loss = imitation_loss(torch.tensor(student).double(), torch.tensor(teacher).double(), "logits", temperature)
    assert float(loss) == pytest.approx(by_hand(student, teacher, temperature), rel=1e-6, abs=1e-9)


def test_the_gradient_keeps_its_size_when_the_temperature_rises() -> None:
    """What T² is for: at high temperature the gradient tends to (z − v)/N whatever T is (Hinton et al., 2.1)."""
    teacher = torch.tensor([[1.0, -1.0, 0.0]], dtype=torch.float64)
    for temperature in (50.0, 500.0):
        student = torch.tensor([[0.5, 0.2, -0.7]], dtype=torch.float64, requires_grad=True)
        imitation_loss(student, teacher, "logits", temperature).backward()
        assert student.grad is not None
        assert torch.allclose(student.grad, (student.detach() - teacher) / 3, atol=0.02)


def test_embedding_loss_is_one_minus_cosine() -> None:
    output, target = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert float(imitation_loss(output, target, "embeddings")) == pytest.approx((1 - math.sqrt(0.5)) / 2)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_alpha_weighs_soft_labels_against_the_task(alpha: float) -> None:
    workload = Toy()
    teacher, student = workload.source(), workload.skeleton({"width": 5})
    batch = next(workload.batches("train", 8))
    total = distillation_loss(teacher, workload, DistillConfig(alpha=alpha, temperature=3.0))(student, batch)
    output, target = student(**batch.inputs), teacher(**batch.inputs)
    task = nn.functional.cross_entropy(output, batch.targets)
    expected = alpha * by_hand(output.tolist(), target.tolist(), 3.0) + (1 - alpha) * float(task)
    assert float(total) == pytest.approx(expected, rel=1e-4)


def test_hidden_loss_leaves_padding_out() -> None:
    taught, learned = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    learned[:, 2] = 100.0
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    learned[1, 1] = 100.0
    assert float(hidden_loss([taught], [learned], mask)) == pytest.approx(1.0)
    assert float(hidden_loss([taught, taught], [learned, taught], mask)) == pytest.approx(0.5)
    assert float(hidden_loss([taught], [learned])) > 1000


def test_the_teacher_stays_as_it_is() -> None:
    workload = Toy(
        lambda width=16: nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))
    )
    teacher = workload.source().train()
    teacher.body[0].weight.requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    config = DistillConfig(architecture={"width": 4}, train=TrainConfig(epochs=2))
    student, report = distill(teacher, workload, config)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(child.training for child in teacher.modules())
    assert [p.requires_grad for p in teacher.parameters()] == [False] + [True] * 5
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not student.training
    assert report.student_parameters == sum(p.numel() for p in student.parameters()) < report.teacher_parameters
    assert report.architecture == {"width": 4}


def test_the_teacher_is_restored_when_training_fails() -> None:
    workload = Toy()
    teacher = workload.source().train()
    workload.x[0] = math.nan
    with pytest.raises(StageError):
        distill(teacher, workload, DistillConfig(architecture={"width": 4}, train=TrainConfig(epochs=1)))
    assert teacher.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_equal_seeds_give_equal_students() -> None:
    workload = Toy()
    teacher = workload.source()

    def weights(seed: int) -> Tensor:
        config = DistillConfig(architecture={"width": 4}, train=TrainConfig(epochs=2, seed=seed))
        return nn.utils.parameters_to_vector(distill(teacher, workload, config)[0].parameters()).detach()

    first = weights(1)
    torch.rand(7)
    assert torch.equal(first, weights(1))
    assert not torch.equal(first, weights(2))


@settings(max_examples=20)
@given(st.sets(st.integers(0, 5), min_size=1, max_size=5))
def test_layer_drop_copies_the_chosen_layers(chosen: set[int]) -> None:
    workload = Toy(Stack)
    teacher = workload.source()
    keep = sorted(chosen)
    student = make_student(teacher, workload, DistillConfig(student="layer-drop", keep_layers=keep))
    layers, taught = layer_list(student), layer_list(teacher)
    assert len(layers) == len(keep)
    assert len(taught) == 6
    for index, source in enumerate(keep):
        assert torch.equal(layers[index].weight, taught[source].weight)
        assert layers[index].weight is not taught[source].weight


def test_hidden_states_are_matched_to_the_layers_that_were_kept() -> None:
    workload = Toy(Stack)
    teacher = workload.source()
    config = DistillConfig(student="layer-drop", keep_layers=[1, 4], alpha=1.0, hidden_weight=2.0)
    student = make_student(teacher, workload, config)
    batch = next(workload.batches("train", 8))
    taught_layers = [layer_list(teacher)[1], layer_list(teacher)[4]]
    with (
        recorded(taught_layers) as taught,
        recorded(list(layer_list(student))) as learned,
        matched(teacher, student, workload, config) as matching,
    ):
        loss = distillation_loss(teacher, workload, config, matching)(student, batch)
        states = [state.clone() for state in (*taught, *learned)]
    matching = ((states[0] - states[2]).square().mean() + (states[1] - states[3]).square().mean()) / 2
    plain = distillation_loss(teacher, workload, config)(student, batch)
    assert float(loss) == pytest.approx(float(plain + 2 * matching), rel=1e-5)
    assert not any(layer._forward_hooks for layer in taught_layers)


def test_hidden_matching_brings_the_student_nearer() -> None:
    workload = Toy(Stack)
    teacher = workload.source()
    train = TrainConfig(epochs=20, batch_size=16, learning_rate=0.02)
    config = DistillConfig(student="layer-drop", keep_layers=[0, 2, 5], alpha=1.0, hidden_weight=1.0, train=train)
    _, report = distill(teacher, workload, config)
    assert report.train.final_loss < 0.5 * report.train.first_loss
    assert report.keep_layers == [0, 2, 5]


def test_recorded_takes_the_first_of_a_tuple() -> None:
    module = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.randn(1, 3, 4)
    with recorded([module]) as states:
        expected, _ = module(x, x, x)
    assert torch.equal(states[0], expected)


def test_frozen_restores_each_part() -> None:
    module = nn.Sequential(mlp(), mlp().eval())
    module[1][0].bias.requires_grad_(False)
    before = [(child.training) for child in module.modules()], [p.requires_grad for p in module.parameters()]
    with frozen(module):
        assert not any(child.training for child in module.modules())
        assert not any(p.requires_grad for p in module.parameters())
    assert before == ([(child.training) for child in module.modules()], [p.requires_grad for p in module.parameters()])


def test_bad_students_are_refused() -> None:
    stack, flat = Toy(Stack), Toy()
    drop = DistillConfig(student="layer-drop", keep_layers=[0, 9])
    with pytest.raises(WorkloadError, match=r"\[9\](.|\n)*0 to 5"):
        make_student(stack.source(), stack, drop)
    with pytest.raises(WorkloadError, match="ModuleList"):
        make_student(flat.source(), flat, drop)
    with pytest.raises(StageError, match="smaller student"):
        distill(flat.source(), flat, DistillConfig(architecture={"width": 16}))


@pytest.mark.parametrize("outputs", ["logits", "embeddings"])
def test_a_student_of_another_width_is_refused(outputs: Outputs) -> None:
    def make(width: int = 16, dim: int = 3) -> nn.Module:
        return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, dim))

    workload = Toy(make, outputs=outputs)
    config = DistillConfig(architecture={"width": 4, "dim": 2}, alpha=1.0, train=TrainConfig(epochs=1))
    with pytest.raises(StageError, match=r"(?s)\[48, 2\], the teacher's \[48, 3\].*distill\.architecture"):
        distill(workload.source(), workload, config)


def test_a_loss_that_needs_no_targets_counts_in_training() -> None:
    class Unlabelled(Toy):
        def loss(self, output: Tensor, batch: Batch) -> Tensor:
            return (output - batch.inputs["x"][:, :3]).square().mean()

    workload = Unlabelled()
    teacher, student = workload.source(), workload.skeleton({"width": 5})
    batch = Batch(next(workload.batches("train", 8)).inputs)
    loss = distillation_loss(teacher, workload, DistillConfig(alpha=0.0))(student, batch)
    assert float(loss.detach()) == pytest.approx(float(workload.loss(student(**batch.inputs), batch).detach()))


def test_a_batch_without_targets_is_refused_in_training_and_imitated_only_in_early_stop() -> None:
    workload = Toy()
    teacher, student = workload.source(), workload.skeleton({"width": 5})
    inputs = next(workload.batches("train", 8)).inputs
    loss_fn = distillation_loss(teacher, workload, DistillConfig(alpha=0.5))
    with pytest.raises(WorkloadError, match=r"(?s)without targets.*distill\.alpha"):
        loss_fn(student, Batch(inputs))
    assert float(loss_fn(student.eval(), Batch(inputs))) == pytest.approx(
        0.5 * float(imitation_loss(student(**inputs), teacher(**inputs), "logits", 2.0))
    )
