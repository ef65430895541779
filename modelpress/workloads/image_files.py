"""Images from files: a folder per class, a .parquet or an .npz; what cannot be read is named, nothing is skipped."""

from __future__ import annotations

import contextlib
import io
import struct
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modelpress.errors import SetupError, WorkloadError

SUFFIXES = {".png", ".jpg", ".jpeg"}

MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
"""Of Pillow: those that become 8 bits of grey or colour and lose nothing but transparency."""


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
    encoded: list[tuple[str, Path | bytes]] = []
    labels: list[int] = []
    for label, folder in enumerate(classes):
        for path in sorted(one for one in folder.rglob("*") if one.is_file() and not one.name.startswith(".")):
            if path.suffix.lower() not in SUFFIXES:
                raise WorkloadError(
                    f"reading images from {root}", found=str(path), expected=f"files of {', '.join(sorted(SUFFIXES))}"
                )
            encoded.append((str(path), path))
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


def _decode(encoded: Sequence[tuple[str, Path | bytes]], size: int, source: str) -> np.ndarray:
    """(N, H, W, C) uint8: one channel where all images are grey, three otherwise; turned as their EXIF data say.

    One image at a time is held as large as it comes.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise SetupError(f"reading {source}", found="no Pillow", fix="pip install pillow") from error
    modes = []
    for name, data in encoded:
        with _opened(name, data) as image:
            modes.append(image.mode)
        if modes[-1] not in MODES:
            raise WorkloadError(
                f"reading image {name}",
                found=f"mode {modes[-1]}",
                expected=f"8 bits for each channel: a mode among {', '.join(MODES)}",
                fix="save it with 8 bits for each channel, grey or RGB; or bring arrays from 0 to 1 as an .npz",
            )
    mode = "L" if all(one in ("L", "1") for one in modes) else "RGB"
    pixels: list[np.ndarray] = []
    for name, data in encoded:
        with _opened(name, data) as image:
            upright = ImageOps.exif_transpose(image).convert(mode)
        if size:
            upright = upright.resize((size, size), Image.Resampling.BILINEAR)
        pixels.append(np.asarray(upright))
        if pixels[-1].shape != pixels[0].shape:
            height, width = pixels[0].shape[:2]
            raise WorkloadError(
                f"reading images from {source}",
                found=f"{encoded[0][0]} of {width}×{height}, {name} of {upright.width}×{upright.height}",
                expected="one size",
                fix="set workload.image_size, and all are resized to it",
            )
    return np.stack(pixels).reshape(len(pixels), *pixels[0].shape[:2], -1)


@contextlib.contextmanager
def _opened(name: str, data: Path | bytes) -> Iterator[Any]:
    """A Pillow image whose pixels are not yet read; what goes wrong inside is told with its name."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            yield image
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise WorkloadError(
            f"reading image {name}", found=f"{type(error).__name__}: {error}"[:200], expected="a PNG or JPEG"
        ) from error


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
