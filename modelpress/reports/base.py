"""What all reports share."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Stage = Literal[
    "source",
    "profile",
    "distill",
    "prune",
    "export",
    "quantize",
    "plan",
    "compress",
    "shard",
    "upload",
    "register",
    "gate",
]


class Report(BaseModel):
    """Base of all reports."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def metrics(self) -> dict[str, float]:
        """Every number of this report, nested reports flattened to ``path.to.field``; lists are left out."""
        flat: dict[str, float] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, bool) or value is None:
                continue
            if isinstance(value, int | float):
                flat[name] = float(value)
            elif isinstance(value, Report):
                flat |= {f"{name}.{key}": number for key, number in value.metrics().items()}
        return flat

    def series(self) -> dict[str, list[float]]:
        """What was measured step by step, such as the loss of each epoch, by ``path.to.name``; of nested reports."""
        return {
            f"{name}.{key}": numbers
            for name in type(self).model_fields
            if isinstance(value := getattr(self, name), Report)
            for key, numbers in value.series().items()
        }


class ArtifactRef(Report):
    """A finished output: what crosses the boundary between tasks."""

    uri: str
    """Where it lies: the store's URI, a slash, the key."""
    sha256: str
    """Digest of its bytes, hex."""
    size_bytes: int
    """Its length."""
