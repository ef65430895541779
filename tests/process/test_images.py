"""Images as a served model reads them: what the workload saw, and what is no image, or too large, is refused."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modelpress.config import WorkloadConfig
from modelpress.errors import InputError
from modelpress.process import Feature, ImageInput, Pipeline, image
from modelpress.workload import load_workload
from modelpress.workloads.image_classification import ImageClassification


def png(pixels: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("colours", [1, 3])
def test_an_image_becomes_the_pixels_that_the_workload_reads(tmp_path: Path, colours: int) -> None:
    """Files of a folder, one of them turned by its EXIF data, resized: bit for bit what training saw."""
    random = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        for number in range(6):
            shape = (20, 30) if colours == 1 else (20, 30, 3)
            picture = Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8))
            exif = Image.Exif()
            exif[0x0112] = 6 if number == 3 else 1
            picture.save(tmp_path / name / f"{number}.jpg", quality=90, exif=exif)
    config = {"kind": "image-classification", "model": "lenet-5", "data": str(tmp_path), "image_size": 28}
    workload = load_workload(WorkloadConfig.model_validate(config | {"calibration_samples": 2}))
    assert isinstance(workload, ImageClassification)
    spec = workload.processing()
    assert spec is not None
    inputs = [Feature("image", np.dtype(np.float32), ("batch", colours, 28, 28))]
    pipeline = Pipeline(spec, workload.files(), inputs, [Feature("output", np.dtype(np.float32), ("batch", 2))])
    files = [path for name in ("cats", "dogs") for path in sorted((tmp_path / name).iterdir())]
    found = pipeline.prepare([path.read_bytes() for path in files])["image"]
    assert found.dtype == np.float32
    assert (found == workload.images.numpy()).all()
    encoded = pipeline.prepare([base64.b64encode(path.read_bytes()) for path in files])["image"]
    assert (encoded == found).all()
    finished = pipeline.finish({"output": np.array([[1.0, 2.0]], np.float32)}, {})
    assert finished["labels"].tolist() == [[b"dogs", b"cats"]]


def test_images_that_no_file_holds_have_no_processing(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 2), dtype=np.uint8)
    np.savez(tmp_path / "two.npz", images=images, labels=np.arange(40) % 2)
    config = {"kind": "image-classification", "model": "lenet-5", "data": str(tmp_path / "two.npz")}
    assert load_workload(WorkloadConfig.model_validate(config | {"calibration_samples": 2})).processing() is None


def reader(**changes: Any) -> image.ImageReader:
    return image.ImageReader(ImageInput.model_validate({"height": 4, "width": 4} | changes))


def read(data: bytes, **changes: Any) -> np.ndarray:
    return reader(**changes).read([data])["pixel_values"]


def test_pixels_are_divided_and_normalised_by_channel() -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    expected = (pixels / 255 - mean) / std
    assert np.allclose(read(png(pixels), mean=mean, std=std, layout="HWC")[0], expected, atol=1e-6)
    assert np.allclose(read(png(pixels), mean=mean, std=std)[0], expected.transpose(2, 0, 1), atol=1e-6)


def test_the_middle_is_cut_out() -> None:
    pixels = np.zeros((4, 12, 3), np.uint8)
    pixels[:, 4:8] = 255
    assert (read(png(pixels), shorter_side=4) == 1.0).all()
    assert (read(png(pixels.transpose(1, 0, 2)), shorter_side=4) == 1.0).all()
    assert read(png(pixels)).mean() == pytest.approx(1 / 3, abs=0.05)  # squeezed, all of it


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * min(height * (width + 1), 10**6))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


GREY = png(np.arange(64, dtype=np.uint8).reshape(8, 8))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no image"),
        (b"GIF89a" + b"\0" * 100, "no image"),
        (b"\x89PNG\r\n\x1a\n", "no image"),
        (GREY[:-30], "no image"),
        (GREY[:40], "no image"),
        (bomb(1, 60_000), "1 × 60000"),
        (bomb(60_000, 1), "60000 × 1"),
        (bomb(30_000, 30_000), "DecompressionBombError"),
        (bomb(5000, 5000), "5000 × 5000"),
        (bomb(2**31 - 1, 2**31 - 1), ""),
        (bomb(100, 0), "no image"),
        (b"\xff\xd8\xff" + b"\0" * 1000, "no image"),
        (b"iVBOR!!!!", "base64"),
        (b"/9j/" + b"A" * 4001, "base64"),
        (b"\0" * (image.MAX_IMAGE_BYTES + 1), "bytes"),
        (png(np.arange(16, dtype=np.uint16).reshape(4, 4)), "mode I;16"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value,
)
def test_what_is_no_image_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(InputError) as caught:
        read(data)
    assert caught.value.doing == "reading image 0"
    assert said in (caught.value.found or "")
    assert len(str(caught.value)) < 400


@given(st.integers(0, len(GREY) - 1), st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_read(at: int, bits: int) -> None:
    data = bytearray(GREY)
    data[at] ^= bits
    try:
        assert read(bytes(data)).shape == (1, 3, 4, 4)
    except InputError:
        return


def test_images_that_become_too_large_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "MAX_ARRAY_BYTES", 1000)
    assert reader().read([GREY] * 5)["pixel_values"].shape == (5, 3, 4, 4)
    with pytest.raises(InputError, match="1152 bytes"):
        reader().read([GREY] * 6)
