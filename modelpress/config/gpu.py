"""Where a run computes."""

from __future__ import annotations

from pydantic import Field

from modelpress.config.base import Bytes, Config


class GpuConfig(Config):
    """A GPU for the stages that train, and for graphs that are judged on one; it is held while such a stage runs."""

    memory: Bytes | None = None
    """Bytes of GPU memory that a stage may take; runs that state it share a device where it holds both. Null: a whole
    device, shared with nobody."""
    wait_seconds: float = Field(default=3600.0, ge=0)
    """How long a stage waits for a free device before the run fails."""
