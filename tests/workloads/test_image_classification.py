"""The digits workload: disjoint by content, deterministic, and honest about what it is given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpress.config import WorkloadConfig
from modelpress.errors import OverlapError, WorkloadError
from modelpress.workload import SPLITS, check_disjoint, load_workload
from modelpress.workloads.digits_cnn import DigitsCNN
from modelpress.workloads.image_classification import ImageClassification


def digits(**changes: object) -> ImageClassification:
    values = {"kind": "image-classification", "model": "digits-cnn", "data": "digits", "train_epochs": 2, **changes}
    workload = load_workload(WorkloadConfig.model_validate(values))
    assert isinstance(workload, ImageClassification)
    return workload


def saved(path: Path, images: np.ndarray, labels: np.ndarray) -> ImageClassification:
    np.savez(path / "data.npz", images=images, labels=labels)
    return digits(data=str(path / "data.npz"), calibration_samples=2)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), calibration=st.integers(1, 300))
def test_splits_cover_the_data_once(seed: int, calibration: int) -> None:
    workload = digits(seed=seed, calibration_samples=calibration)
    rows = torch.cat([workload.rows[split] for split in SPLITS])
    assert sorted(rows.tolist()) == list(range(len(workload.images)))
    assert len(workload.rows["calibration"]) == calibration
    assert abs(len(workload.rows["evaluation"]) - len(workload.images) / 2) <= 1
    check_disjoint(workload)


def test_limits_shorten_a_split_and_move_nothing() -> None:
    whole, short = digits(), digits(train_samples=50, evaluation_samples=60)
    assert {split: len(short.rows[split]) for split in SPLITS} == {"train": 50, "calibration": 128, "evaluation": 60}
    for split in SPLITS:
        assert short.sample_digests(split) <= whole.sample_digests(split)


def test_batches_are_one_pass_in_fixed_or_seeded_order() -> None:
    workload = digits()
    fixed = torch.cat([batch.inputs["image"] for batch in workload.batches("evaluation", 100)])
    assert fixed.shape == (len(workload.rows["evaluation"]), 1, 8, 8)
    assert fixed.dtype == torch.float32
    assert 0 <= fixed.min() < fixed.max() <= 1
    again = torch.cat([batch.inputs["image"] for batch in workload.batches("evaluation", 33)])
    assert torch.equal(fixed, again)

    def labels(seed: int) -> list[int]:
        return torch.cat([b.targets for b in workload.batches("train", 64, seed) if b.targets is not None]).tolist()

    assert labels(1) == labels(1) != labels(2)
    assert sorted(labels(1)) == sorted(labels(2))


def test_only_shuffled_training_batches_are_augmented() -> None:
    workload = digits()
    originals = {image.numpy().tobytes() for image in workload.images}
    assert all(
        image.numpy().tobytes() in originals
        for b in workload.batches("calibration", 64, 1)
        for image in b.inputs["image"]
    )
    batches = [list(workload.batches("train", 64, 1)) for _ in range(2)]
    assert not any(image.numpy().tobytes() in originals for image in batches[0][0].inputs["image"])
    assert all(torch.equal(a.inputs["image"], b.inputs["image"]) for a, b in zip(*batches, strict=True))


def test_the_teacher_is_large_learns_and_repeats_itself() -> None:
    workload = digits()
    notes: list[str] = []
    first = workload.source(lambda _done, _total, note="": notes.append(note))
    second = workload.source()
    assert sum(parameter.numel() for parameter in first.parameters()) > 500_000
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert "epoch 2/2" in notes[-1]
    assert not first.training
    with torch.no_grad():
        outputs = np.concatenate([first(**b.inputs).numpy() for b in workload.batches("evaluation", 128)])
    scores = workload.score(outputs)
    assert scores.shape == (len(workload.rows["evaluation"]),)
    assert scores.dtype == np.float64
    assert scores.mean() > 0.85


def test_score_counts_right_answers_one_by_one() -> None:
    workload = digits()
    labels = workload.labels[workload.rows["evaluation"]].numpy()
    outputs = np.eye(10, dtype=np.float32)[labels]
    assert workload.score(outputs).tolist() == [1.0] * len(labels)
    outputs[::3] = np.roll(outputs[::3], 1, axis=1)
    expected = np.ones(len(labels))
    expected[::3] = 0
    assert workload.score(outputs).tolist() == expected.tolist()


def test_a_slice_of_each_class_where_the_config_asks() -> None:
    assert digits().slices() == {}
    sliced = digits(slice_by_class=True)
    labels = torch.cat([batch.targets for batch in sliced.batches("evaluation", 64) if batch.targets is not None])
    found = sliced.slices()
    assert list(found) == [f"class {number}" for number in range(10)]
    for number in range(10):
        assert found[f"class {number}"].tolist() == (labels == number).tolist()
    assert sliced.identity() != digits().identity()


def test_identity_follows_data_and_config(tmp_path: Path) -> None:
    images, labels = np.random.default_rng(0).random((20, 8, 8)), np.arange(20) % 3
    first = saved(tmp_path, images, labels).identity()
    assert saved(tmp_path, images, labels).identity() == first
    images[0, 0, 0] += 0.1
    assert saved(tmp_path, images, labels).identity() != first
    assert digits().identity() == digits().identity() != digits(seed=1).identity()


def test_a_student_is_built_from_its_architecture() -> None:
    workload = digits()
    student = workload.skeleton({"channels": [4, 8], "hidden": 6})
    assert isinstance(student, DigitsCNN)
    assert student(**workload.example(3)).shape == (3, 10)
    with pytest.raises(WorkloadError, match="widht"):
        workload.skeleton({"widht": 3})
    with pytest.raises(WorkloadError, match="halv"):
        workload.skeleton({"channels": [2] * 9})
    with pytest.raises(WorkloadError, match="widths"):
        workload.skeleton({"channels": [0]})
    with pytest.raises(WorkloadError, match="widths"):
        workload.skeleton({"channels": []})


def test_images_of_ones_own(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 9, 7, 3), dtype=np.uint8)
    images[10:20] = images[:10]
    workload = saved(tmp_path, images, np.arange(30) // 2 % 4)
    assert workload.images.shape == (20, 3, 9, 7)
    assert float(workload.images.max()) <= 1.0
    assert workload.classes == 4
    assert workload.skeleton({})(**workload.example(2)).shape == (2, 4)
    check_disjoint(workload)


def test_classes_are_numbered_without_a_gap_and_each_is_trained(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((40, 8, 8))
    with pytest.raises(WorkloadError, match=r"(?s)up to 9000000000000, and no sample of \[1\]"):
        saved(tmp_path, images, np.arange(40) % 2 * 9 * 10**12)
    with pytest.raises(WorkloadError, match="finite images"):
        saved(tmp_path, images, np.full(40, 2**63, np.uint64))
    rare = np.arange(40) % 2
    rare[int(saved(tmp_path, images, rare).rows["evaluation"][0])] = 2
    with pytest.raises(WorkloadError, match=r"(?s)none of class '2' for training.*train_samples"):
        saved(tmp_path, images, rare)
    with pytest.raises(WorkloadError, match="none of class"):
        digits(train_samples=5)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((4, 8)), np.zeros(4, int), "finite images"),
        (np.zeros((4, 8, 8)), np.zeros(3, int), "finite images"),
        (np.zeros((4, 8, 8)), np.zeros(4), "finite images"),
        (np.full((4, 8, 8), np.nan), np.zeros(4, int), "finite images"),
        (np.zeros((4, 8, 8)), np.zeros(4, int), "1 distinct"),
        (np.array([{}] * 4, dtype=object), np.zeros(4, int), "pickled"),
        (np.zeros((0, 8, 8)), np.zeros(0, int), "at least one"),
        (np.zeros((4, 0, 8)), np.zeros(4, int), "at least one"),
        (np.zeros((4, 8, 8), np.uint16), np.zeros(4, int), "uint16"),
        (np.zeros((4, 8, 8), np.int64), np.zeros(4, int), "int64"),
        (np.arange(256.0).reshape(4, 8, 8), np.zeros(4, int), "from 0 to 255"),
        (np.full((4, 8, 8), -0.5), np.zeros(4, int), "from -0.5 to -0.5"),
    ],
    ids=[
        *("rank", "lengths", "float labels", "nan", "all equal", "pickled"),
        *("none", "no pixels", "uint16", "int64", "0 to 255", "negative"),
    ],
)
def test_bad_images_are_refused(tmp_path: Path, images: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        saved(tmp_path, images, labels)


def test_bad_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"missing\.npz"):
        digits(data=str(tmp_path / "missing.npz"))
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(WorkloadError, match="npz"):
        digits(data=str(tmp_path / "text.npz"))
    np.savez(tmp_path / "other.npz", pictures=np.zeros(3))
    with pytest.raises(WorkloadError, match="images"):
        digits(data=str(tmp_path / "other.npz"))
    with pytest.raises(WorkloadError, match="digits-cnn"):
        digits(model="resnet50")
    with pytest.raises(WorkloadError, match="calibration_samples"):
        digits(calibration_samples=1000)


def test_overlap_is_found_by_content() -> None:
    workload = digits()
    workload.images[workload.rows["train"][5]] = workload.images[workload.rows["evaluation"][7]]
    with pytest.raises(OverlapError, match="1 shared"):
        check_disjoint(workload)


@pytest.mark.parametrize(("model", "parameters"), [("lenet-300-100", 266_610), ("lenet-5", 431_080)])
def test_the_lenets_have_the_sizes_of_the_papers(model: str, parameters: int) -> None:
    workload = digits(model=model, data="digits-28")
    module = workload.skeleton({})
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters
    (batch,) = (batch for batch, _ in zip(workload.batches("evaluation", 5), range(1), strict=False))
    assert batch.inputs["image"].shape == (5, 1, 28, 28)
    assert module(**batch.inputs).shape == (5, 10)


def test_upsampled_digits_are_the_digits() -> None:
    small, large = digits(), digits(data="digits-28")
    assert torch.equal(small.labels, large.labels)
    assert 0 <= large.images.min() < large.images.max() <= 1
    again = torch.nn.functional.adaptive_avg_pool2d(large.images, 8)
    pairs = torch.stack([again.flatten(), small.images.flatten()])
    assert torch.corrcoef(pairs)[0, 1] > 0.95
    assert large.licence() == small.licence()


def test_a_lenet_can_have_other_widths_but_not_impossible_ones() -> None:
    widths = {"channels": [3, 4], "hidden": 6}
    module = digits(model="lenet-5", data="digits-28").skeleton(widths)
    assert [tuple(weight.shape) for weight in module.parameters() if weight.dim() > 1] == [
        (3, 1, 5, 5),
        (4, 3, 5, 5),
        (6, 64),
        (10, 6),
    ]
    with pytest.raises(WorkloadError, match="unknown channels"):
        digits(model="lenet-300-100").skeleton(widths)
    with pytest.raises(WorkloadError, match="16×16"):
        digits(model="lenet-5").skeleton({})
    with pytest.raises(WorkloadError, match="widths from 1 up"):
        digits(model="lenet-300-100").skeleton({"hidden": [3, 0]})
