"""The config of a profile."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from modelpress.config.base import Config
from modelpress.providers import CPU, Provider

_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._ -]{0,62}[A-Za-z0-9])?")
"""Name of a machine or of a network; it is part of metrics' names, which may hold nothing else."""
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ProfileConfig(Config):
    """Where the time, the bytes, the joules and the money of a model go on this machine."""

    runtime: Literal["onnxruntime", "torch"] = "onnxruntime"
    """What runs the model: the graph that would be served, or the torch module it is made from."""
    provider: Provider = CPU
    """For `onnxruntime`: its execution provider; one that is asked for and missing is an error."""
    threads: int = Field(default=0, ge=0)
    """Threads of one operator; 0 takes the cores that this process may use."""
    batch_size: int = Field(default=1, ge=1)
    """Samples of a run whose operators are profiled."""
    batch_sizes: list[Annotated[int, Field(ge=1)]] = Field(default=[1, 8, 32], min_length=1)
    """Batch sizes whose latency is measured in a closed loop."""
    seconds: float = Field(default=2.0, gt=0, le=600)
    """Time spent on each: the operators, each batch size, each rate of arrivals, each ceiling of the machine."""
    loads: list[Annotated[float, Field(gt=0, le=2)]] = [0.3, 0.6, 0.8, 0.95]
    """Rates of Poisson arrivals, as shares of what the machine can answer one by one; above 1 the queue only grows."""
    requests_per_start: int = Field(default=100_000, ge=1)
    """Requests that a server answers before it is started anew: over so many a cold start is shared."""
    bandwidths: dict[str, Rate] = {"1 Gbit": 125e6, "10 Gbit": 1.25e9}
    """Networks that a pack may come over, in bytes per second: its transfer is modelled on each, and the slowest
    counts in the verdict."""
    prices: dict[str, Rate] = {}
    """Price table: what an hour of a machine like this one costs, by the machine's (or the contract's) name."""
    currency: str = Field(default="USD", pattern=r"^[A-Z]{3}$")
    """Currency of all prices."""
    price_per_kilowatt_hour: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Price of energy where it is not part of the machine's; 0: it is."""
    max_joules_per_request: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Budget of energy: beyond it, energy binds. 0: none."""
    max_cost_per_million: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Budget of a million requests, in `currency`, on the cheapest machine of `prices`: beyond it, cost binds. 0:
    none."""
    seed: int = Field(default=0, ge=0)
    """Seed of the arrivals."""

    @model_validator(mode="after")
    def _check(self) -> ProfileConfig:
        for name in ("batch_sizes", "loads"):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ValueError(f"profile.{name} must not repeat")
        for name in ("bandwidths", "prices"):
            if wrong := [label for label in getattr(self, name) if not _LABEL.fullmatch(label)]:
                raise ValueError(
                    f"profile.{name} has the name {wrong[0][:80]!r}: up to 64 letters, digits, dots, dashes, "
                    "underscores and blanks are legal, with a letter or a digit at both ends"
                )
        if self.max_cost_per_million and not self.prices:
            raise ValueError("profile.max_cost_per_million needs profile.prices")
        if self.runtime == "torch" and self.provider != CPU:
            raise ValueError("profile.provider is only read with profile.runtime 'onnxruntime'")
        return self
