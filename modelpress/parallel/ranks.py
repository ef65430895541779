"""The ranks: processes that compute one thing together, as torchrun or anybody else starts them.

Who they are stands in the environment (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`), as PyTorch has it. Between
joining and computing stand functions that have nothing to do with it, `distill` and `prune_`; as with
`modelpress.resume`, a context variable spares them an argument.

Numbers on which ranks agree go over the CPU (gloo), wherever they compute. Objects are never sent: PyTorch would
pickle them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from modelpress.config import ParallelConfig
from modelpress.errors import ConfigError, SetupError
from modelpress.parallel.traffic import Traffic, open_sockets, sent_bytes

DEVICES = {"gloo": "cpu", "nccl": "cuda", "xla": "xla"}
"""Where a backend's ranks compute. ROCm devices are called "cuda" in PyTorch, and RCCL "nccl"."""
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Ranks:
    """This process among its like."""

    rank: int
    size: int
    device: torch.device
    config: ParallelConfig
    weights: dist.ProcessGroup
    """For parameters and gradients: a group of its own, so that their bytes can be told apart on the wire."""
    sockets: set[int]
    """Of `weights`."""
    traffic: Traffic

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks for all: keeps the state, writes the output."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums over the ranks, the same bits on each."""
        numbers = torch.tensor(values, dtype=torch.float64)
        self.traffic.summed("control", numbers.nbytes)
        dist.all_reduce(numbers)
        return [float(value) for value in numbers]

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """The values of each rank, by its number."""
        own = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.size)]
        self.traffic.gathered("control", own.nbytes * self.size)
        dist.all_gather(found, own)
        return [[float(value) for value in one] for one in found]

    def from_first(self, data: bytes | None) -> bytes | None:
        """The first rank's bytes, or its None, on each."""
        size = torch.tensor([-1 if data is None else len(data)])
        self._broadcast(size)
        length = int(size)
        if length < 0:
            return None
        held = bytearray(data) if self.first and data is not None else bytearray(length)
        if length:
            self._broadcast(torch.frombuffer(held, dtype=torch.uint8))
        return bytes(held)

    def first_(self, tensors: Sequence[Tensor]) -> None:
        """Write the first rank's values into these tensors of each; plain ones, of the same shapes everywhere."""
        with torch.no_grad():
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                self.traffic.spread("parameters", whole.nbytes)
                dist.broadcast(whole, 0, group=self.weights)
                tensor.copy_(whole)

    def wire_bytes(self) -> int | None:
        """What the sockets for parameters and gradients have sent so far; None where there are none, or nobody says."""
        return sent_bytes(self.sockets) if self.config.backend == "gloo" else None

    def _broadcast(self, tensor: Tensor) -> None:
        self.traffic.spread("control", tensor.nbytes)
        dist.broadcast(tensor, 0)


_current: ContextVar[Ranks | None] = ContextVar("modelpress_ranks", default=None)


def current() -> Ranks | None:
    """The ranks that this process is one of; None where it computes alone."""
    return _current.get()


@contextmanager
def joined(config: ParallelConfig, environment: Mapping[str, str] | None = None) -> Iterator[Ranks]:
    """This process is one of the ranks while this is open.

    Args:
        config: the backend, and how long to wait for the others.
        environment: says who this is; None takes the process's own.

    Raises:
        ConfigError: the environment does not say who this is.
        SetupError: the backend is not here, or the ranks do not find each other.
    """
    environment = os.environ if environment is None else environment
    rank, size, local = _who(environment)
    device = device_of(config, local)
    address = f"tcp://{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    patience = timedelta(seconds=config.timeout_seconds)
    kinds = "gloo" if config.backend == "gloo" else f"cpu:gloo,{DEVICES[config.backend]}:{config.backend}"
    try:
        dist.init_process_group(kinds, address, timeout=patience, world_size=size, rank=rank)
        before = open_sockets()
        weights = dist.new_group(timeout=patience, backend=kinds)
    except (dist.DistError, RuntimeError, ValueError) as error:
        if dist.is_initialized():
            dist.destroy_process_group()
        raise SetupError(
            f"joining {size} ranks at {address} as rank {rank}",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            expected=f"all of them there within {config.timeout_seconds:g} s, and for rank 0 a free port",
            fix="free the port, or name another (torchrun --rdzv-endpoint host:port); let the ranks reach each other, "
            "by the interface that GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names",
        ) from error
    found = Ranks(rank, size, device, config, weights, open_sockets() - before, Traffic(size))
    token = _current.set(found)
    try:
        yield found
    finally:
        _current.reset(token)
        dist.destroy_process_group()


def device_of(config: ParallelConfig, local: int) -> torch.device:
    """The device of a machine's rank number `local`, which becomes CUDA's current one.

    Raises:
        SetupError: see `require`.
    """
    require(config, local)
    if config.backend != "nccl":
        return torch.device(DEVICES[config.backend])
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def require(config: ParallelConfig, local: int) -> None:
    """Refuse what a machine's rank number `local` could not compute with; nothing is set up.

    Raises:
        SetupError: the backend is not here, or there are fewer devices.
    """
    lacking = missing(config.backend)
    if lacking is not None:
        raise SetupError(
            f"computing with parallel.backend {config.backend!r}",
            found=lacking[0],
            expected=f"a PyTorch and devices that have {config.backend}",
            fix=lacking[1],
        )
    if config.backend == "nccl" and local >= torch.cuda.device_count():
        raise SetupError(
            f"giving rank {local} of this machine a device",
            found=f"{torch.cuda.device_count()} devices",
            expected="one for each rank",
            fix="lower parallel.processes, show it more devices (CUDA_VISIBLE_DEVICES), or take more machines",
        )


def missing(backend: str) -> tuple[str, str] | None:
    """What a backend lacks here, and the way to have it; None where it is here."""
    if backend == "gloo" and not dist.is_gloo_available():
        return f"torch {torch.__version__}, which was built without gloo", "install PyTorch's own build"
    if backend == "nccl" and not torch.cuda.is_available():
        return (
            f"no CUDA or ROCm device that torch {torch.__version__} can use",
            "run it on a worker with GPUs (`modelpress doctor`), or set parallel.backend to gloo",
        )
    if backend == "nccl" and not dist.is_nccl_available():
        return f"torch {torch.__version__}, which was built without NCCL or RCCL", "install a build that has it"
    if backend == "xla":
        if importlib.util.find_spec("torch_xla") is None:
            return "no package torch_xla", "install torch_xla on a machine with a TPU, or set parallel.backend to gloo"
        importlib.import_module("torch_xla.distributed.xla_backend")  # makes the backend known to PyTorch
        if not dist.is_backend_available("xla"):
            return "a torch_xla that brings no backend", "install the torch_xla that fits this torch"
    return None


def _who(environment: Mapping[str, str]) -> tuple[int, int, int]:
    lacking = [name for name in _NEEDED if name not in environment]
    try:
        rank, size = int(environment.get("RANK", "")), int(environment.get("WORLD_SIZE", ""))
        local = int(environment.get("LOCAL_RANK", str(rank)))
    except ValueError:
        rank, size, local = -1, 0, 0
    if lacking or not 0 <= rank < size:
        raise ConfigError(
            "looking which rank this process is",
            found=f"no {', '.join(lacking)} in the environment"
            if lacking
            else f"RANK={environment['RANK']}, WORLD_SIZE={environment['WORLD_SIZE']}",
            expected="what torchrun sets: RANK below WORLD_SIZE, MASTER_ADDR and MASTER_PORT",
            fix="start it with torchrun, or through a recipe (parallel.processes)",
        )
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # The agent keeps its store for all attempts: ranks that are started again read where the dead ones listened.
        raise ConfigError(
            "meeting the other ranks",
            found="a store that torchrun shares between all attempts, with addresses of ranks that are gone",
            expected="a store for each attempt",
            fix="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started",
        )
    return rank, size, local
