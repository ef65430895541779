"""Encoded images to floats, by Pillow; what an image claims is looked at before any pixel is made."""

from __future__ import annotations

import base64
import binascii
import io
import struct
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from modelpress.errors import InputError, SetupError
from modelpress.process.spec import ImageInput

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_IMAGE_BYTES: Final = 2**24
"""Of one encoded image."""
MAX_IMAGE_PIXELS: Final = 2**24
"""Of one image, as it comes: 4096 × 4096, 48 MiB in colour. Images are decoded one after the other."""
MAX_IMAGE_SIDE: Final = 2**14
MAX_ARRAY_BYTES: Final = 2**28
"""Of what a call's images become."""
FORMATS: Final = ("PNG", "JPEG")
ENCODED: Final = (b"iVBOR", b"/9j/")
"""How base64 of a PNG and of a JPEG begins, and no image does: JSON has no other way for bytes."""
MODES: Final = ("1", "L", "LA", "P", "RGB", "RGBA")
"""Of Pillow: those that become 8 bits of grey or colour and lose nothing but transparency."""


class ImageReader:
    """Makes arrays of encoded images. Safe to call from threads.

    Args:
        spec: what the description says.

    Raises:
        SetupError: Pillow is missing.
    """

    def __init__(self, spec: ImageInput) -> None:
        try:
            from PIL import Image
        except ImportError as error:
            raise SetupError("reading images", found="no Pillow", fix="pip install pillow") from error
        self._spec = spec
        self._filter = Image.Resampling[spec.resample.upper()]
        self._mean, self._std = (
            np.array(numbers, np.float32) if numbers else None for numbers in (spec.mean, spec.std)
        )

    def read(self, images: Sequence[bytes]) -> dict[str, np.ndarray]:
        """The graph's input by its name: (images, channels, height, width) float32, or with the channels last.

        Raises:
            InputError: one is no PNG or JPEG of 8 bits a channel, or larger than what is taken.
        """
        spec = self._spec
        size = 4 * len(images) * spec.height * spec.width * spec.channels
        if size > MAX_ARRAY_BYTES:
            raise InputError("reading images", found=f"{size} bytes of pixels", expected=f"at most {MAX_ARRAY_BYTES}")
        array = np.empty((len(images), spec.height, spec.width, spec.channels), np.float32)
        for number, data in enumerate(images):
            array[number] = self._pixels(data, f"reading image {number}")
        if spec.layout == "CHW":
            array = np.ascontiguousarray(array.transpose(0, 3, 1, 2))
        return {spec.pixels: array}

    def _pixels(self, data: bytes, doing: str) -> np.ndarray:
        """(height, width, channels) float32."""
        spec = self._spec
        image = self._fitted(self._decoded(data, doing))
        pixels = np.asarray(image).reshape(spec.height, spec.width, spec.channels).astype(np.float32)
        pixels /= np.float32(spec.divisor)
        if self._mean is not None:
            pixels -= self._mean
        if self._std is not None:
            pixels /= self._std
        return pixels

    def _decoded(self, data: bytes, doing: str) -> Image:
        """Upright, in the mode that is asked for.

        Raises:
            InputError: it can't be, or should not.
        """
        from PIL import Image, ImageOps

        if len(data) > MAX_IMAGE_BYTES:
            raise InputError(doing, found=f"{len(data)} bytes", expected=f"at most {MAX_IMAGE_BYTES}")
        if data.startswith(ENCODED):
            try:
                data = base64.b64decode(data, validate=True)
            except binascii.Error as error:
                raise InputError(doing, found="base64 that is broken", expected="a whole PNG or JPEG") from error
        refused: tuple[Any, ...] = (Image.DecompressionBombError, Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height, mode = image.width, image.height, image.mode
                if width * height > MAX_IMAGE_PIXELS or max(width, height) > MAX_IMAGE_SIDE:
                    expected = f"at most {MAX_IMAGE_PIXELS} pixels, and {MAX_IMAGE_SIDE} on a side"
                    raise InputError(doing, found=f"{width} × {height}", expected=expected)
                if mode not in MODES:
                    expected = f"8 bits for each channel: a mode among {', '.join(MODES)}"
                    raise InputError(doing, found=f"mode {mode}", expected=expected)
                return ImageOps.exif_transpose(image).convert(self._spec.mode)
        except (OSError, ValueError, SyntaxError, EOFError, OverflowError, struct.error, zlib.error, *refused) as error:
            # Pillow's own texts name objects of Python, and may be as long as what was sent.
            raise InputError(
                doing, found=f"no image ({type(error).__name__})", expected="a whole PNG or JPEG"
            ) from error

    def _fitted(self, image: Image) -> Image:
        spec = self._spec
        if spec.shorter_side is None:
            same = image.size == (spec.width, spec.height)
            return image if same else image.resize((spec.width, spec.height), self._filter)
        # Of a long narrow image, only what is cut out is ever resized.
        scale = spec.shorter_side / min(image.size)
        width, height = spec.width / scale, spec.height / scale
        left, top = (image.width - width) / 2, (image.height - height) / 2
        box = (max(left, 0.0), max(top, 0.0), min(left + width, image.width), min(top + height, image.height))
        return image.resize((spec.width, spec.height), self._filter, box=box)
