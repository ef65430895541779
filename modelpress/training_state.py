"""The whole state of a training as bytes: weights, optimizer, best weights, losses and random numbers.

The bytes are the sha256 of the rest, and a safetensors file::

    parameter.<name>, buffer.<name>     the module's, also buffers that no state dict has; tied ones once
    best.<name>                         the state dict of the best epoch, with early stop
    optimizer.<parameter>.<name>        parameters by their number
    random.cpu, random.cuda             the generators of torch

whose metadata is one JSON text: `About`, what was trained and how, and `Position`, how far it is. What was cut off goes
on to the same weights, bit by bit, where an uninterrupted training would have found them: on one machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from modelpress import __version__
from modelpress.config import TrainConfig
from modelpress.errors import CorruptionError
from modelpress.parallel.parts import part_of, whole

DIGEST_BYTES = 32


class About(BaseModel):
    """What a state belongs to. It is of use where all of this is equal."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    modelpress: str
    torch: str
    device: str
    """Kind of device: the random numbers of another are others."""
    config: str
    """Fingerprint of the `TrainConfig`."""
    updates_per_epoch: int
    start: str
    """sha256 (hex) of the weights at the start and of which of them are trained."""


class Position(BaseModel):
    """How far a training is."""

    model_config = ConfigDict(extra="forbid", strict=True)

    epoch: int = Field(default=0, ge=0)
    """Epochs that are finished."""
    batches: int = Field(default=0, ge=0)
    """Of the epoch under way."""
    samples: int = Field(default=0, ge=0)
    """Of the epoch under way."""
    loss_sum: float = 0.0
    """Of the epoch under way."""
    updates: int = Field(default=0, ge=0)
    losses: list[float] = []
    """Mean loss of each finished epoch."""
    best: float | None = None
    """Least calibration loss so far."""
    stale: int = Field(default=0, ge=0)
    """Epochs since then."""
    stopped: bool = False
    """Whether it was stopped early."""
    parts: int = Field(default=1, ge=1)
    """Into how many parts a batch is cut since memory ran out."""
    memory_errors: list[str] = []
    """What was said each time that it did."""
    done: bool = False
    """Whether the training is over; the optimizer's state is left out then."""


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    about: About
    position: Position
    numbers: dict[str, float | int | bool | None]
    """What an optimizer keeps that is no tensor, under the names that tensors have."""


@dataclass
class Live:
    """What a running training holds, as tensors that can be read and written in place."""

    module: nn.Module
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    device: torch.device

    def describe(self, config: TrainConfig, updates_per_epoch: int) -> About:
        """What the training is, before its first update."""
        return About(
            modelpress=__version__,
            torch=torch.__version__,
            device=self.device.type,
            config=config.fingerprint(),
            updates_per_epoch=updates_per_epoch,
            start=_digest(self.module, self.parameters),
        )

    def to_bytes(self, about: About, position: Position, best: dict[str, Tensor] | None) -> bytes:
        """The state; of a training that is done, without what only a further update would need."""
        tensors = {name: _copy(value) for name, value in _own(self.module)}
        numbers: dict[str, float | int | bool | None] = {}
        if not position.done:
            tensors |= {f"best.{name}": _copy(value) for name, value in (best or {}).items()}
            tensors["random.cpu"] = torch.get_rng_state()
            if self.device.type == "cuda":
                tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
            for number, entries in self.optimizer.state_dict()["state"].items():
                for name, value in entries.items():
                    if isinstance(value, Tensor):
                        tensors[f"optimizer.{number}.{name}"] = _copy(value)
                    else:
                        numbers[f"optimizer.{number}.{name}"] = value
        header = _Header(about=about, position=position, numbers=numbers)
        body = safetensors.torch.save(tensors, {"training": header.model_dump_json()})
        return hashlib.sha256(body).digest() + body

    def restore_(self, data: bytes, about: About) -> tuple[Position, dict[str, Tensor] | None, Random]:
        """Put a state back in place; what comes back are its position, the best weights, and the random numbers to go
        on with. Nothing is touched where it raises.

        Raises:
            CorruptionError: the bytes are damaged, or of another training.
        """
        tensors, header = _read(data)
        different = [
            f"{name} {found!r} for {getattr(about, name)!r}"
            for name, found in header.about.model_dump().items()
            if found != getattr(about, name)
        ]
        if different:
            raise _refused(", ".join(different), "the state of this very training")
        own = dict(_own(self.module))
        stored = {name: value for name, value in tensors.items() if name.startswith(("parameter.", "buffer."))}
        if {name: (value.shape, value.dtype) for name, value in stored.items()} != {
            name: (value.shape, value.dtype) for name, value in own.items()
        }:
            raise _refused("other tensors than the module has", "a tensor for each")
        random = Random(tensors.get("random.cpu"), tensors.get("random.cuda"))
        if not header.position.done and (random.cpu is None or (self.device.type == "cuda" and random.cuda is None)):
            raise _refused("no random numbers", "those of each device")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(part_of(stored[name], value))
        if not header.position.done:
            self._restore_optimizer(tensors, header.numbers)
        now = self.module.state_dict()
        best = {
            name.removeprefix("best."): part_of(value.to(self.device), now[name.removeprefix("best.")])
            for name, value in tensors.items()
            if name.startswith("best.")
        }
        return header.position, best or None, random

    def _restore_optimizer(self, tensors: dict[str, Tensor], numbers: dict[str, float | int | bool | None]) -> None:
        state: dict[int, dict[str, object]] = {}
        entries: dict[str, object] = {**tensors, **numbers}
        for key, value in entries.items():
            if key.startswith("optimizer."):
                _, number, name = key.split(".", 2)
                parameter = self.parameters[int(number)]
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value = part_of(value, parameter)
                state.setdefault(int(number), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


@dataclass(frozen=True)
class Random:
    """The states of torch's generators."""

    cpu: Tensor | None
    cuda: Tensor | None

    def set(self, device: torch.device) -> None:
        """Go on with these numbers."""
        if self.cpu is not None:
            torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)


def keeps_more_than_tensors(module: nn.Module) -> list[str]:
    """Submodules that keep a state of their own kind (`get_extra_state`), which is in no tensor."""
    base = nn.Module.get_extra_state
    return [name or "itself" for name, child in module.named_modules() if type(child).get_extra_state is not base]


def _read(data: bytes) -> tuple[dict[str, Tensor], _Header]:
    body = data[DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != data[:DIGEST_BYTES]:
        raise _refused(f"{len(data)} bytes of another sha256", "the bytes that were written")
    try:
        tensors = safetensors.torch.load(body)
        facts = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])["__metadata__"]
        return tensors, _Header.model_validate_json(facts["training"])
    except (safetensors.SafetensorError, ValidationError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise _refused(f"{type(error).__name__}: {error}", "a training's state") from error


def _refused(found: str, expected: str) -> CorruptionError:
    return CorruptionError("reading a training's state", found=found, expected=expected)


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer once, tied or not in the state dict."""
    for name, parameter in module.named_parameters():
        yield f"parameter.{name}", parameter
    for name, buffer in module.named_buffers():
        yield f"buffer.{name}", buffer


def _copy(value: Tensor) -> Tensor:
    return whole(value.detach()).to("cpu", copy=True).contiguous()


def _digest(module: nn.Module, parameters: list[nn.Parameter]) -> str:
    trained = {id(parameter) for parameter in parameters}
    digest = hashlib.sha256()
    for name, value in _own(module):
        here = whole(value.detach()).cpu().contiguous()
        digest.update(f"{name} {here.dtype} {tuple(here.shape)} {id(value) in trained}\n".encode())
        digest.update(here.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
