"""What all configs share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

PackName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$")]
"""Name of a pack: lower-case letters, digits, dot, dash, underscore; it is part of object keys."""

Alias = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]
"""Name of a pointer, such as ``champion``."""

Bytes = Annotated[int, Field(gt=0)]


class Config(BaseModel):
    """Base of all configs: frozen, unknown keys refused, docstrings as help text.

    A field's title is its name, so that forms, recipes and errors call it the same. Without one, Prefect's form calls a
    field that holds a model after the class, or just "Field".
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, field_title_generator=lambda name, _: name
    )

    decides: ClassVar[bool] = True
    """Whether what is made hangs on it; one that only says where and how is no part of a fingerprint."""

    def fingerprint(self) -> str:
        """sha256 (hex) of the canonical JSON of what decides in this config: part of a stage's cache key."""
        canonical = json.dumps(_deciding(self, self.model_dump(mode="json")), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def _deciding(config: Config, dumped: dict[str, Any]) -> dict[str, Any]:
    """A dumped config without the configs in it that decide nothing."""
    inside = {name: value for name in type(config).model_fields if isinstance(value := getattr(config, name), Config)}
    kept = {name: value for name, value in dumped.items() if name not in inside}
    return kept | {name: _deciding(value, dumped[name]) for name, value in inside.items() if value.decides}


def refuse_unread(config: Config, stage: str, unread: Mapping[str, str]) -> None:
    """Refuse what is set and would have no effect; a default, spelt out, is no claim.

    Args:
        config: of a stage.
        stage: its name in a recipe.
        unread: fields that nothing reads as the others stand, each with what would read it.

    Raises:
        ValueError: one of them has another value than its default.
    """
    for name, reader in unread.items():
        if getattr(config, name) != type(config).model_fields[name].get_default(call_default_factory=True):
            raise ValueError(f"{stage}.{name} is only read with {reader}")
