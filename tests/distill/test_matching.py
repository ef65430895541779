"""What a student learns from inside its teacher, on the layers of real encoders, decoders and CNNs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from modelpress.checkpoint import from_module, to_module
from modelpress.config import DistillConfig, TrainConfig, WorkloadConfig
from modelpress.distill import count_parameters, distill, frozen, make_student, matched
from modelpress.errors import StageError
from modelpress.workload import Workload, load_workload
from modelpress.workloads.causal_lm import CausalLM
from tests.decoders import SIZES, make_text_folder
from tests.encoders import make_encoder_folder
from tests.train.toy import Toy


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    texts = make_text_folder(tmp_path_factory.mktemp("texts"))
    return CausalLM(
        WorkloadConfig(
            kind="causal-lm", model="tiny-decoder", data=str(texts), length=16, architecture=SIZES, train_samples=32,
            calibration_samples=8, evaluation_samples=8,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    folder = make_encoder_folder(tmp_path_factory.mktemp("encoder"), pairs=40)
    values = {"kind": "sentence-embedding", "model": str(folder), "data": str(folder / "pairs.jsonl")}
    return load_workload(WorkloadConfig.model_validate(values))


@pytest.fixture(scope="module")
def digits() -> Workload:
    return load_workload(
        WorkloadConfig(kind="image-classification", model="digits-cnn", data="digits", train_samples=64, train_epochs=2)
    )


def training(**changes: object) -> TrainConfig:
    return TrainConfig.model_validate({"epochs": 6, "batch_size": 16, "learning_rate": 0.01, **changes})


def test_a_narrower_student_learns_hidden_states_through_projections(language: CausalLM) -> None:
    teacher = language.skeleton({})
    before = copy.deepcopy(teacher.state_dict())
    narrow = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = DistillConfig(architecture=narrow, alpha=0.01, hidden_weight=1.0, train=training())
    student, report = distill(teacher, language, config)
    assert report.train.final_loss < report.train.first_loss
    # Nothing of the projections is left: the checkpoint is that of a plain student, and no hook stays.
    assert set(student.state_dict()) == set(language.skeleton(narrow).state_dict())
    assert report.student_parameters == count_parameters(student)
    assert not any(child._forward_hooks for model in (teacher, student) for child in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_projections_stand_only_where_widths_differ_and_are_trained(language: CausalLM) -> None:
    teacher = language.skeleton({})
    for width, expected in ((16, [(32, 16)]), (32, [])):
        config = DistillConfig(architecture={"hidden_size": width, "num_hidden_layers": 1}, hidden_weight=1.0)
        student = make_student(teacher, language, config)
        with frozen(teacher), matched(teacher, student, language, config) as matching:
            assert matching is not None
            assert [tuple(one.weight.shape) for one in matching.projections] == expected
            if expected:
                batch = language.example(2)
                teacher(**batch)
                student(**batch)
                matching.loss(None).backward()
                assert float(matching.projections[0].weight.grad.abs().sum()) > 0


@pytest.mark.parametrize(("kept", "expected"), [(1, [5]), (2, [2, 5]), (3, [1, 3, 5]), (5, [0, 1, 3, 4, 5])])
def test_layers_are_matched_evenly_and_the_last_with_the_last(kept: int, expected: list[int]) -> None:
    from modelpress.distill.matching import _layer_pairs

    def stack(layers: int) -> nn.Module:
        return nn.Sequential(nn.ModuleList(nn.Linear(2, 2) for _ in range(layers)))

    teacher, student = stack(6), stack(kept)
    pairs = _layer_pairs(teacher, student, DistillConfig(hidden_weight=1.0))
    assert [list(teacher[0]).index(taught) for taught, _ in pairs] == expected


@pytest.mark.parametrize("name", ["language", "encoder"])
def test_attention_of_the_last_layers_comes_nearer(name: str, request: pytest.FixtureRequest) -> None:
    workload: Workload = request.getfixturevalue(name)
    torch.manual_seed(0)
    teacher = workload.skeleton({})
    for parameter in teacher.parameters():
        parameter.data *= 3  # a random model looks everywhere alike
    config = DistillConfig(architecture={"num_hidden_layers": 1}, alpha=0.001, attention_weight=1.0, train=training())
    _, report = distill(teacher, workload, config)
    assert report.train.final_loss < 0.9 * report.train.first_loss


def test_equal_models_have_nothing_to_match(language: CausalLM, digits: Workload) -> None:
    for workload in (language, digits):
        teacher = workload.source() if workload is digits else workload.skeleton({})
        student = copy.deepcopy(teacher)
        weights = {"hidden_weight": 1.0, **({} if workload is digits else {"attention_weight": 1.0})}
        with frozen(teacher), matched(teacher, student, workload, DistillConfig.model_validate(weights)) as matching:
            assert matching is not None
            batch = workload.example(3)
            teacher(**batch)
            student(**batch)
            assert float(matching.loss(None).detach()) == pytest.approx(0.0, abs=1e-5)


def test_a_cnn_learns_where_its_teacher_looks(digits: Workload) -> None:
    torch.manual_seed(1)
    teacher = digits.skeleton({})
    config = DistillConfig(
        architecture={"channels": [8, 16], "hidden": 16}, alpha=0.001, hidden_weight=1.0, train=training()
    )
    _, report = distill(teacher, digits, config)
    assert report.train.final_loss < report.train.first_loss


def test_what_does_not_match_is_refused(language: CausalLM, digits: Workload) -> None:
    teacher = language.skeleton({})
    heads = DistillConfig(architecture={"num_attention_heads": 1, "num_hidden_layers": 1}, attention_weight=1.0)
    with pytest.raises(StageError, match=r"(?s)1 heads, the teacher has 2"):
        distill(teacher, language, heads)
    none = DistillConfig(architecture={"channels": [4], "hidden": 8}, attention_weight=1.0)
    with pytest.raises(StageError, match=r"(?s)attention of DigitsCNN.*attention_weight"):
        distill(digits.skeleton({}), digits, none)
    flat = Toy()
    with pytest.raises(StageError, match=r"(?s)matching feature maps.*hidden_weight"):
        distill(flat.source(), flat, DistillConfig(architecture={"width": 4}, hidden_weight=1.0))


@pytest.mark.parametrize("name", ["language", "encoder", "digits"])
def test_a_narrower_copy_of_the_teacher_is_near_it_from_the_start(name: str, request: pytest.FixtureRequest) -> None:
    workload: Workload = request.getfixturevalue(name)
    teacher = workload.source() if name != "language" else workload.skeleton({})
    config = DistillConfig(student="width-slice", keep_width=0.5, train=training(epochs=1, learning_rate=1e-4))
    student, report = distill(teacher, workload, config)
    assert report.student_parameters < 0.95 * report.teacher_parameters
    rebuilt = to_module(from_module(student, report.architecture), workload)
    with torch.no_grad():
        inputs = workload.example(4)
        assert torch.equal(rebuilt(**inputs), student(**inputs))
        near = nn.functional.cosine_similarity(student(**inputs).flatten(), teacher(**inputs).flatten(), dim=0)
    assert float(near) > 0.7
