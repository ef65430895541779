"""Images from files: a folder per class, a .parquet or an .npz; what cannot be read is named, nothing is skipped."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modelpress.errors import SetupError, WorkloadError

SUFFIXES = {".png", ".jpg", ".jpeg"}


@dataclass(frozen=True)
class Images:
    """`pixels` (N, H, W) or (N, H, W, C), uint8 or float32 from 0 to 1; `labels` (N,) integers; names of the classes
    where the source has some."""

    pixels: np.ndarray
    labels: np.ndarray
    names: list[str] | None = None


def read_images(source: str, size: int) -> Images:
    """The images of a folder, a .parquet or an .npz.

    Args:
        source: its path.
        size: of encoded images, height and width that they are resized to; 0 takes them as they are.

    Raises:
        WorkloadError: nothing there, a file that is no image, sizes that differ, or one class alone.
        SetupError: a library that the kind of file needs is missing.
    """
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, size)
    return _read_parquet(path, size) if path.suffix == ".parquet" else _read_npz(path)


def _read_folder(root: Path, size: int) -> Images:
    """Each sub-folder is a class; PNG and JPEG; hidden files are left out."""
    classes = sorted(one for one in root.iterdir() if one.is_dir() and not one.name.startswith("."))
    encoded: list[tuple[str, bytes]] = []
    labels: list[int] = []
    for label, folder in enumerate(classes):
        for path in sorted(one for one in folder.rglob("*") if one.is_file() and not one.name.startswith(".")):
            if path.suffix.lower() not in SUFFIXES:
                raise WorkloadError(
                    f"reading images from {root}", found=str(path), expected=f"files of {', '.join(sorted(SUFFIXES))}"
                )
            encoded.append((str(path), path.read_bytes()))
            labels.append(label)
    found = sorted(set(labels))
    if len(found) < 2 or len(found) < len(classes):
        empty = [one.name for number, one in enumerate(classes) if number not in found]
        raise WorkloadError(
            f"reading images from {root}",
            found=f"{len(classes)} sub-folders" + (f", {empty[0]!r} without an image" if empty else ""),
            expected="a sub-folder of images for each class, at least two",
        )
    return Images(_decode(encoded, size, str(root)), np.array(labels), [one.name for one in classes])


def _read_parquet(path: Path, size: int) -> Images:
    """Columns `image` (encoded bytes, `{"bytes": …}` as Hugging Face datasets have it, or nested lists) and `label`."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise SetupError(f"reading {path}", found="no pyarrow", fix="pip install pyarrow") from error
    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path, columns=["image", "label"]).to_pylist()
        images, labels = [row["image"] for row in rows], [row["label"] for row in rows]
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise WorkloadError(
            f"reading images from {path}", found=str(error)[:200], expected="a .parquet with `image` and `label`"
        ) from error
    names = None
    if labels and all(isinstance(label, str) for label in labels):
        names = sorted(set(labels))
        labels = [names.index(label) for label in labels]
    if len(set(labels)) < 2 or not all(type(label) is int for label in labels):
        raise WorkloadError(
            f"reading labels from {path}",
            found=f"{len(labels)} labels such as {labels[0]!r}" if labels else "no rows",
            expected="at least two classes, all by name or all by number",
        )
    images = [one["bytes"] if isinstance(one, dict) and "bytes" in one else one for one in images]
    if all(isinstance(one, bytes) for one in images):
        named = [(f"{path}, row {number}", one) for number, one in enumerate(images)]
        return Images(_decode(named, size, str(path)), np.array(labels), names)
    arrays = [np.array(one) for one in images]
    if any(one.dtype.kind not in "iu" or one.shape != arrays[0].shape for one in arrays):
        raise WorkloadError(
            f"reading images from {path}",
            found="arrays of different shapes, or not of whole numbers",
            expected="encoded images, or arrays (H, W) or (H, W, C) from 0 to 255 of one shape",
        )
    pixels = np.stack(arrays)
    if pixels.min() < 0 or pixels.max() > 255:
        raise WorkloadError(
            f"reading images from {path}", found=f"numbers from {pixels.min()} to {pixels.max()}", expected="0 to 255"
        )
    return Images(pixels.astype(np.uint8), np.array(labels), names)


def _decode(encoded: Sequence[tuple[str, bytes]], size: int, source: str) -> np.ndarray:
    """(N, H, W, C) uint8: one channel where all images are grey, three otherwise."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise SetupError(f"reading {source}", found="no Pillow", fix="pip install pillow") from error
    images = []
    for name, data in encoded:
        try:
            image = Image.open(io.BytesIO(data))
            image.load()
        except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise WorkloadError(
                f"reading image {name}", found=f"{type(error).__name__}: {error}"[:200], expected="a PNG or JPEG"
            ) from error
        images.append(image)
    mode = "L" if all(image.mode in ("L", "1") for image in images) else "RGB"
    sizes = [image.size for image in images]
    if not size and len(set(sizes)) > 1:
        other = next(number for number, one in enumerate(sizes) if one != sizes[0])
        raise WorkloadError(
            f"reading images from {source}",
            found=f"{encoded[0][0]} of {sizes[0][0]}×{sizes[0][1]}, {encoded[other][0]} of "
            f"{sizes[other][0]}×{sizes[other][1]}",
            expected="one size",
            fix="set workload.image_size, and all are resized to it",
        )
    box = (size, size)
    pixels = [
        np.asarray(image.convert(mode).resize(box, Image.Resampling.BILINEAR) if size else image.convert(mode))
        for image in images
    ]
    return np.stack(pixels).reshape(len(pixels), *pixels[0].shape[:2], -1)


def _read_npz(path: Path) -> Images:
    try:
        with np.load(path, allow_pickle=False) as archive:
            images, labels = archive["images"], archive["labels"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise WorkloadError(
            f"reading images from {path}",
            found=str(error),
            expected="an .npz with arrays `images` and `labels`, without pickled objects",
        ) from error
    if images.dtype != np.uint8 and images.dtype != np.bool_ and not np.issubdtype(images.dtype, np.floating):
        raise WorkloadError(
            f"reading images from {path}",
            found=f"images of {images.dtype}, whose largest value is not known",
            expected="uint8, or floats from 0 to 1",
            fix="divide them by the largest value that a pixel can have: images.astype('float32') / largest",
        )
    return Images(images if images.dtype == np.uint8 else images.astype(np.float32), labels)
