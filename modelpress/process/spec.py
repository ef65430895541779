"""The description, `processing.json`: what it may say, and no more. Its layout is part of docs/format.md."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from modelpress import strictjson
from modelpress.errors import ConfigError, CorruptionError
from modelpress.manifest import canonical_json, check_version

PROCESSING_FILE: Final = "processing.json"
"""Name of the file in a pack."""
FORMAT_VERSION: Final = 1
MAX_BYTES: Final = 2**20
MAX_STEPS: Final = 16
MAX_SIDE: Final = 4096
"""Pixels of what an image becomes."""

Tensor = Annotated[str, Field(min_length=1, max_length=256)]
"""Name of an input or output of the graph, or of what a step makes."""
File = Annotated[str, Field(min_length=1, max_length=256)]
"""Name of a file of the pack."""
Number = Annotated[float, Field(allow_inf_nan=False)]


class Part(BaseModel):
    """Base of the description's parts: frozen, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class TextInput(Part):
    """UTF-8 text to token ids, by a fast tokenizer."""

    kind: Literal["text"] = "text"
    name: Tensor = "text"
    """What a client calls it."""
    tokenizer: File = "tokenizer.json"
    """File of the tokenizer, as the package `tokenizers` saves it."""
    max_length: int = Field(ge=1, le=2**20)
    """Tokens; a longer text is cut."""
    pad_id: int = Field(default=0, ge=0, lt=2**32)
    """Number of the token that fills up the shorter texts of a batch."""
    pad_token: str = Field(default="[PAD]", max_length=256)
    """The token itself."""
    ids: Tensor = "input_ids"
    """The graph's input for token ids, (batch, length) int64."""
    mask: Tensor | None = "attention_mask"
    """The graph's input for the mask, 1 where there is a token; null: it has none."""
    types: Tensor | None = None
    """The graph's input for token types; null: it has none."""


class ImageInput(Part):
    """An encoded image, PNG or JPEG, to floats: turned upright, one mode, resized, cut, divided, normalised."""

    kind: Literal["image"] = "image"
    name: Tensor = "image"
    """What a client calls it."""
    pixels: Tensor = "pixel_values"
    """The graph's input, (batch, channels, height, width) float32; or with the channels last."""
    mode: Literal["L", "RGB"] = "RGB"
    """Grey or colour."""
    height: int = Field(ge=1, le=MAX_SIDE)
    """Pixels of what the graph gets."""
    width: int = Field(ge=1, le=MAX_SIDE)
    """Pixels of what the graph gets."""
    shorter_side: int | None = Field(default=None, ge=1, le=MAX_SIDE)
    """The image is resized until its shorter side has so many pixels, and then cut to the middle; null: it is resized
    to height and width, whatever its form."""
    resample: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    """Pillow's filter."""
    divisor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 255.0
    """What each value from 0 to 255 is divided by."""
    mean: tuple[Number, ...] = ()
    """What is taken off each channel then; empty: nothing."""
    std: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = ()
    """What each channel is divided by then; empty: nothing."""
    layout: Literal["CHW", "HWC"] = "CHW"
    """Order of the graph's axes."""

    @property
    def channels(self) -> int:
        """1 or 3."""
        return 1 if self.mode == "L" else 3

    @model_validator(mode="after")
    def _check(self) -> ImageInput:
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (0, self.channels):
                raise ValueError(f"{name}: {len(getattr(self, name))} numbers for {self.channels} channels")
        if self.shorter_side is not None and self.shorter_side < max(self.height, self.width):
            raise ValueError(f"shorter_side {self.shorter_side}: less than is cut out, {self.height} × {self.width}")
        return self


class MeanPool(Part):
    """The mean over the tokens that are not padding: (batch, length, width) to (batch, width)."""

    kind: Literal["mean-pool"] = "mean-pool"
    of: Tensor
    """What is pooled, which is gone then."""
    to: Tensor = "embedding"
    """What comes out."""


class Normalize(Part):
    """Each row divided by its length (L2), over the last axis."""

    kind: Literal["normalize"] = "normalize"
    of: Tensor
    """What is normalised, in place."""


class Softmax(Part):
    """Logits to probabilities, over the last axis."""

    kind: Literal["softmax"] = "softmax"
    of: Tensor
    """The logits, which stay."""
    to: Tensor = "probabilities"
    """What comes out."""


class TopK(Part):
    """The greatest few of each row, with the names of their classes."""

    kind: Literal["top-k"] = "top-k"
    of: Tensor
    """(batch, classes), which stays."""
    k: int = Field(default=5, ge=1, le=1000)
    """How many; of fewer classes, all."""
    labels: File | None = "labels.json"
    """File of the classes' names in order, a JSON list; null: their numbers."""
    to_labels: Tensor = "labels"
    """(batch, k) of text."""
    to_scores: Tensor = "scores"
    """(batch, k) float32, from the greatest down."""


Step = Annotated[MeanPool | Normalize | Softmax | TopK, Field(discriminator="kind")]


class Processing(Part):
    """What stands before a graph, and behind it."""

    format_version: Literal[1] = FORMAT_VERSION
    """Version of this layout."""
    input: Annotated[TextInput | ImageInput, Field(discriminator="kind")]
    """How what a client sends becomes the graph's inputs."""
    steps: tuple[Step, ...] = Field(default=(), max_length=MAX_STEPS)
    """What is done to the graph's outputs, in this order."""

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def files(self) -> set[str]:
        """Names of the files that it needs."""
        needed = {step.labels for step in self.steps if isinstance(step, TopK) and step.labels is not None}
        return needed | ({self.input.tokenizer} if isinstance(self.input, TextInput) else set())

    @classmethod
    def parse(cls, data: bytes) -> Processing:
        """Read what `to_bytes` wrote.

        Raises:
            CorruptionError: it is no such description.
            UnsupportedFormatError: written by a newer modelpress.
        """
        doing = f"reading {PROCESSING_FILE}"
        if len(data) > MAX_BYTES:
            raise CorruptionError(doing, found=f"{len(data)} bytes", expected=f"at most {MAX_BYTES}")
        document = strictjson.loads(data, doing)
        check_version(document.get("format_version"), doing, FORMAT_VERSION)
        try:
            return cls.model_validate(document)
        except (ValidationError, ConfigError) as error:
            found = str(error.errors(include_url=False)[0])[:300] if isinstance(error, ValidationError) else error.found
            raise CorruptionError(doing, found=found, expected="a description as in docs/format.md") from error
