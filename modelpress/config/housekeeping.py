"""The config of retention."""

from __future__ import annotations

from pydantic import Field

from modelpress.config.base import Config


class RetentionConfig(Config):
    """Which versions of a pack stay. What any rule keeps stays; the rest may go."""

    keep_versions: int = Field(default=3, ge=1)
    """The newest versions of each name that stay, whatever points at them."""
    keep_days: float = Field(default=30.0, ge=0)
    """Versions that are younger stay, and those that an alias pointed at within this many days."""
    rollbacks: int | None = Field(default=None, ge=0)
    """How many steps back each alias can be rolled back; left out, to every version that it can be today."""
