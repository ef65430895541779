"""Images as files: real digits as PNG, JPEG and parquet, sizes, grey and colour; a file that is none is named."""

from __future__ import annotations

import importlib.util
import io
import json
import weakref
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
from PIL import Image, PngImagePlugin
from sklearn.datasets import load_digits

from modelpress.checkpoint import from_module, to_module
from modelpress.config import ExportConfig, WorkloadConfig
from modelpress.errors import SetupError, WorkloadError
from modelpress.export import export
from modelpress.workload import check_disjoint, load_workload
from modelpress.workloads.image_classification import ImageClassification
from modelpress.workloads.image_files import read_images


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    found = load_digits(n_class=3)
    return (found.images[:90] * 15.9).astype(np.uint8), found.target[:90]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, digits: tuple[np.ndarray, np.ndarray]) -> Path:
    path = tmp_path_factory.mktemp("images")
    for number, (pixels, label) in enumerate(zip(*digits, strict=True)):
        (path / f"class-{label}").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path / f"class-{label}" / f"{number:03}.png")
    (path / "class-0" / ".DS_Store").write_bytes(b"x")
    return path


def workload_of(data: Path, **changes: object) -> ImageClassification:
    values = {
        "kind": "image-classification", "model": "digits-cnn", "data": str(data), "calibration_samples": 8,
        "train_epochs": 1, "architecture": {"channels": [4], "hidden": 8}, **changes,
    }  # fmt: skip
    workload = load_workload(WorkloadConfig.model_validate(values))
    assert isinstance(workload, ImageClassification)
    return workload


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_folder_of_images_has_their_pixels_and_its_names(folder: Path, digits: tuple[np.ndarray, np.ndarray]) -> None:
    workload = workload_of(folder)
    check_disjoint(workload)
    assert json.loads(workload.files()["labels.json"]) == ["class-0", "class-1", "class-2"]
    assert workload.images.shape == (90, 1, 8, 8)
    expected = {pixels.tobytes(): int(label) for pixels, label in zip(*digits, strict=True)}
    for pixels, label in zip(workload.images, workload.labels, strict=True):
        assert expected[(pixels[0] * 255).round().to(torch.uint8).numpy().tobytes()] == int(label)
    module = workload.source()
    assert module(**workload.example(2)).shape == (2, 3)


def test_images_are_resized_to_one_size_if_asked_and_refused_by_name_if_not(tmp_path: Path, folder: Path) -> None:
    for number, (name, size) in enumerate((("a", (8, 8)), ("a", (8, 8)), ("b", (10, 6)))):
        (tmp_path / name).mkdir(exist_ok=True)
        random = np.random.default_rng(number)
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / name / f"{number}.jpg")
    with pytest.raises(WorkloadError, match=r"(?s)0\.jpg of 8×8.*2\.jpg of 6×10.*image_size"):
        read_images(str(tmp_path), 0)
    assert read_images(str(tmp_path), 12).pixels.shape == (3, 12, 12, 3)
    assert workload_of(folder, image_size=16).images.shape[2:] == (16, 16)


def test_images_of_more_than_8_bits_or_of_four_inks_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "good.png").write_bytes(png(np.zeros((8, 8), np.uint8)))
    (tmp_path / "b" / "deep.png").write_bytes(png(np.full((8, 8), 300, np.uint16)))
    with pytest.raises(WorkloadError, match=r"(?s)deep\.png.*mode I;16.*8 bits"):
        read_images(str(tmp_path), 0)
    (tmp_path / "b" / "deep.png").unlink()
    Image.new("CMYK", (8, 8)).save(tmp_path / "b" / "inks.jpg")
    with pytest.raises(WorkloadError, match=r"(?s)inks\.jpg.*mode CMYK"):
        read_images(str(tmp_path), 0)


def test_images_stand_as_their_exif_data_say(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    lying = Image.Exif()
    lying[0x0112] = 6  # to be turned by a quarter, clockwise
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    Image.fromarray(np.rot90(pixels).copy()).save(tmp_path / "a" / "0.png", exif=lying)
    Image.fromarray(pixels).save(tmp_path / "b" / "0.png")
    found = read_images(str(tmp_path), 0).pixels
    assert found.shape == (2, 8, 6, 3)
    np.testing.assert_array_equal(found[0], pixels)
    np.testing.assert_array_equal(found[1], pixels)


def test_one_image_at_a_time_is_held_as_large_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("RGB", (64, 64), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    loaded: list[weakref.ref[Image.Image]] = []
    most = 0
    load = PngImagePlugin.PngImageFile.load

    def watched(image: PngImagePlugin.PngImageFile) -> object:
        nonlocal most
        if not any(one() is image for one in loaded):
            loaded.append(weakref.ref(image))
        most = max(most, sum(one() is not None for one in loaded))
        return load(image)

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", watched)
    assert read_images(str(tmp_path), 8).pixels.shape == (8, 8, 8, 3)
    assert len(loaded) == 8
    assert most <= 2  # the last one's name is bound until the next is open


@pytest.mark.parametrize("content", [b"", b"no image", "cut"])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, content: bytes | str) -> None:
    noise = png(np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "good.png").write_bytes(noise)
    (tmp_path / "b" / "bad.png").write_bytes(noise[:300] if isinstance(content, str) else content)
    with pytest.raises(WorkloadError, match=r"bad\.png"):
        read_images(str(tmp_path), 0)


def test_folders_that_are_no_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="0 sub-folders"):
        read_images(str(tmp_path), 0)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.png").write_bytes(png(np.zeros((4, 4), np.uint8)))
    with pytest.raises(WorkloadError, match="1 sub-folders"):
        read_images(str(tmp_path), 0)
    (tmp_path / "two").mkdir()
    with pytest.raises(WorkloadError, match="'two' without an image"):
        read_images(str(tmp_path), 0)
    (tmp_path / "two" / "notes.txt").write_text("x")
    with pytest.raises(WorkloadError, match=r"notes\.txt"):
        read_images(str(tmp_path), 0)


def write(path: Path, images: list[object], labels: list[object]) -> str:
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "label": labels}), path)
    return str(path)


def test_a_parquet_holds_encoded_images_or_arrays(tmp_path: Path, digits: tuple[np.ndarray, np.ndarray]) -> None:
    pixels, labels = digits[0][:20], digits[1][:20].tolist()
    kinds = {
        "bytes": [png(one) for one in pixels],
        "struct": [{"bytes": png(one), "path": None} for one in pixels],
        "arrays": [one.tolist() for one in pixels],
    }
    for name, images in kinds.items():
        found = read_images(write(tmp_path / f"{name}.parquet", images, labels), 0)
        np.testing.assert_array_equal(found.pixels.reshape(20, 8, 8), pixels)
        assert found.labels.tolist() == labels
    named = read_images(write(tmp_path / "named.parquet", kinds["bytes"], [f"n{label}" for label in labels]), 0)
    assert named.names == ["n0", "n1", "n2"]
    assert named.labels.tolist() == labels


@pytest.mark.parametrize(
    ("images", "labels", "found"),
    [
        ([b"x", b"y"], [0, 1], r"row 0"),
        ([[[0]], [[1]]], [0, 0], "at least two classes"),
        ([[[0]], [[1]]], [0.5, 1.5], "such as 0.5"),
        ([[[0]], [[300]]], [0, 1], "0 to 300"),
        ([[[0]], [[1, 2]]], [0, 1], "different shapes"),
        ([], [], "no rows"),
    ],
)
def test_a_parquet_of_something_else_is_refused(
    tmp_path: Path, images: list[object], labels: list[object], found: str
) -> None:
    with pytest.raises(WorkloadError, match=found):
        read_images(write(tmp_path / "bad.parquet", images, labels), 0)


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"nonsense")
    with pytest.raises(WorkloadError, match=r"bad\.parquet"):
        read_images(str(tmp_path / "bad.parquet"), 0)
    pyarrow.parquet.write_table(pyarrow.table({"picture": [1]}), tmp_path / "other.parquet")
    with pytest.raises(WorkloadError, match=r"`image` and `label`"):
        read_images(str(tmp_path / "other.parquet"), 0)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_missing_library_says_how_to_install_it(folder: Path, library: str) -> None:
    if importlib.util.find_spec(library):
        pytest.skip(f"{library} is installed here")
    workload = workload_of(folder, model=f"{library}:resnet18", architecture={})
    with pytest.raises(SetupError, match=f"pip install {library}"):
        workload.source()


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_librarys_model_is_trained_or_filled_and_exported(tmp_path: Path, folder: Path, library: str) -> None:
    pytest.importorskip(library, reason=f"{library} is not installed: pip install {library}")
    model = f"{library}:resnet18"
    workload = workload_of(folder, model=model, architecture={}, image_size=32, train_samples=16)
    module = workload.source()
    with torch.no_grad():
        inputs = workload.example(3)
        assert torch.equal(to_module(from_module(module), workload)(**inputs), module(**inputs))
    _, report = export(module, workload, ExportConfig())
    assert report.max_difference < 1e-3
    weights = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(module.model.state_dict(), weights)
    filled = workload_of(folder, model=model, architecture={}, image_size=32, weights=str(weights))
    assert not filled.trains_source
    with torch.no_grad():
        assert torch.equal(filled.source()(**inputs), module(**inputs))
    smaller = workload.skeleton({"model": f"{library}:{'resnet10t' if library == 'timm' else 'squeezenet1_1'}"})
    assert smaller(**inputs).shape == (3, 3)
    with pytest.raises(WorkloadError, match="no_such_net"):
        workload.skeleton({"model": f"{library}:no_such_net"})
    weights.write_bytes(b"nonsense")
    with pytest.raises(WorkloadError, match=r"workload\.weights"):
        filled.source()
