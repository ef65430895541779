"""How many processes share the work of a stage."""

from __future__ import annotations

from pydantic import Field

from modelpress.config.base import Config


class WorkersConfig(Config):
    """Worker processes on this machine that share evaluations and plans; the results are those of one process."""

    count: int = Field(default=2, ge=1, le=256)
    """Processes. Each loads the libraries, the data and the model for itself."""
    threads: int = Field(default=0, ge=0)
    """Cores of each; 0: the cores that this process may use, divided by `count`."""
    slices: int = Field(default=0, ge=0, le=65_536)
    """Slices that an evaluation or a plan is cut into: a lost worker costs one; 0: four for each worker."""
    slice_seconds: float = Field(default=0.0, ge=0)
    """After so long a slice's worker is killed, and the slice begins anew in another; 0: never."""
    attempts: int = Field(default=3, ge=1, le=20)
    """How often a slice is tried whose worker dies or takes too long."""
    seed: int = Field(default=0, ge=0)
    """Deals batches and weights to slices, so that long ones do not meet in one."""
