"""A training among ranks: DDP and FSDP2 of PyTorch behind one small face, and the plain one for a process alone.

The loss is computed within the wrapped module's forward pass, so that DDP and FSDP see every parameter that it uses,
also those that hang beside the model (projections of matched hidden states). Each rank's loss counts by its share of
the batch's samples, and gradients are summed, not averaged: the sum is the whole batch's gradient, however many
samples each rank has. (DDP: Li et al. 2020, arXiv:2006.15704. FSDP: Zhao et al. 2023, arXiv:2304.11277.)
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from modelpress.config import ParallelConfig, TrainConfig
from modelpress.errors import ConfigError, StageError
from modelpress.parallel.parts import whole
from modelpress.parallel.ranks import Ranks, current
from modelpress.parallel.training_norms import batch_norms, over_ranks
from modelpress.reports import ParallelReport, TrafficReport
from modelpress.resume import Place, Shelf
from modelpress.workload import Batch, Workload

NOISE_STRIDE = 7_919
"""Parts the seeds of updates' noise, and of ranks'."""
Loss = Callable[[nn.Module, Batch], Tensor]


class Alone:
    """A training of one process."""

    ranks: Ranks | None = None
    shards = False
    """Whether this process holds a part of each weight."""

    def __init__(self, module: nn.Module, loss_fn: Loss) -> None:
        self._module, self._loss_fn = module, loss_fn

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a piece, scalar."""
        return self._loss_fn(self._module, batch)

    def step(self, *, last: bool) -> AbstractContextManager[None]:  # noqa: ARG002
        """Around the forward and backward pass of a piece; gradients are summed over the ranks behind the last."""
        return nullcontext()

    def noise(self, seed: int, update: int) -> None:
        """Take up the random numbers of an update."""

    def sum(self, *values: float) -> tuple[float, ...]:
        """Over the ranks."""
        return values

    def first(self, value: bool) -> bool:
        """What the first rank says."""
        return value

    def place(self, place: Place) -> Place:
        """Where the state is kept, as this process may use it."""
        return place

    @property
    def keeps(self) -> bool:
        """Whether this process has a part in putting the state together."""
        return True

    def report(self, updates: int) -> ParallelReport | None:  # noqa: ARG002
        """What was sent, `updates` after the start; None where nobody is there to send to."""
        return None


class Together(Alone):
    """A training of one rank among others."""

    def __init__(self, module: nn.Module, loss_fn: Loss, ranks: Ranks, ways: ParallelConfig) -> None:
        super().__init__(module, loss_fn)
        self.ranks: Ranks = ranks
        self._ways, self.shards = ways, ways.strategy == "fsdp"
        self._whole = _Loss(module, loss_fn)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._gradient_bytes = sum(parameter.nbytes for parameter in trained)
        ranks.first_([*module.parameters(), *module.buffers()])
        if ways.strategy == "ddp":
            self._wrapped: nn.Module = _ddp(self._whole, ranks)
        else:
            from modelpress.parallel.training_fsdp import sharded

            self._wrapped = sharded(self._whole, ranks)
        self._began = ranks.wire_bytes(), ranks.traffic.needed["parameters"]

    def loss(self, batch: Batch) -> Tensor:
        """See `Alone.loss`."""
        value: Tensor = self._wrapped(batch)
        return value

    @contextmanager
    def step(self, *, last: bool) -> Iterator[None]:
        """See `Alone.step`."""
        if isinstance(self._wrapped, DistributedDataParallel):
            with nullcontext() if last else self._wrapped.no_sync():
                yield
        else:
            self._wrapped.set_requires_gradient_sync(last)  # type: ignore[operator]
            yield

    def noise(self, seed: int, update: int) -> None:
        """From the seed, the update and the rank: nothing has to be kept for a resume, with any number of ranks."""
        if self.ranks.size > 1:
            torch.manual_seed(((seed + 1) * NOISE_STRIDE + update) * NOISE_STRIDE + self.ranks.rank)

    def sum(self, *values: float) -> tuple[float, ...]:
        """See `Alone.sum`."""
        return tuple(self.ranks.sum(values))

    def first(self, value: bool) -> bool:
        """See `Alone.first`."""
        return bool(self.ranks.sum([float(value and self.ranks.first)])[0])

    def place(self, place: Place) -> Place:
        """The first rank alone reads and writes, and tells the others what it read."""
        return Place(_SharedShelf(place.shelf, self.ranks), place.number)

    @property
    def keeps(self) -> bool:
        """See `Alone.keeps`: with FSDP all, as each has a part of the weights."""
        return self.ranks.first or self.shards

    def report(self, updates: int) -> ParallelReport:
        """See `Alone.report`."""
        ranks, traffic = self.ranks, self.ranks.traffic
        wire, began = ranks.wire_bytes(), self._began[0]
        least = 2 * self._gradient_bytes * (ranks.size - 1) / ranks.size
        per_update = (traffic.needed["parameters"] - self._began[1]) / updates if updates else None
        sent = (wire - began) / updates if updates and wire is not None and began is not None else None
        return ParallelReport(
            processes=ranks.size,
            strategy=self._ways.strategy,
            backend=ranks.config.backend,
            gradient_accumulation=self._ways.gradient_accumulation,
            weights_agree=self._agree(),
            restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
            updates=updates,
            traffic=TrafficReport(
                data_bytes=round(traffic.needed["data"]),
                parameters_bytes=round(traffic.needed["parameters"]),
                control_bytes=round(traffic.needed["control"]),
            ),
            least_update_bytes=least,
            needed_update_bytes=per_update,
            wire_update_bytes=sent,
        )

    def _agree(self) -> bool:
        """Whether the ranks hold the same weights; parts of FSDP are put together for it, and so agree."""
        digest = hashlib.sha256()
        for parameter in self._whole.parameters():
            held = whole(parameter.detach()).cpu().contiguous()
            digest.update(held.flatten().view(torch.uint8).numpy().data)
        mark = float(int.from_bytes(digest.digest()[:6], "big"))
        return len({one[0] for one in self.ranks.gather([mark])}) == 1


@contextmanager
def spread(module: nn.Module, loss_fn: Loss, workload: Workload, config: TrainConfig) -> Iterator[Alone]:
    """A training of `module` by this process, or with the ranks that it has joined.

    With FSDP the module's parameters are parts while this is open, and whole again, as the objects that they were,
    behind it.

    Raises:
        ConfigError: the config asks for more processes, and this one has joined none.
        StageError: the model's or the workload's loss is not the sum of its parts'.
    """
    ways = config.parallel
    ranks = current() if ways.processes > 1 else None  # a training for one process is repeated by each
    if ranks is None and ways.processes > 1:
        raise ConfigError(
            "training",
            found=f"parallel.processes {ways.processes}, and one process that has joined no others",
            expected="ranks that train together",
            fix="run it as a recipe (`modelpress run`), which starts them, or under torchrun within "
            "`modelpress.parallel.ranks.joined`; only distill.train and prune.recovery are spread",
        )
    _check(module, workload, ways.gradient_accumulation, ranks)
    if ranks is None:
        yield Alone(module, loss_fn)
        return
    with ExitStack() as stack:
        if ranks.size > 1:
            stack.enter_context(over_ranks(module, ranks))
        if ways.strategy == "fsdp":
            from modelpress.parallel.training_fsdp import restored

            stack.enter_context(restored(module))
        yield Together(module, loss_fn, ranks, ways)


def _check(module: nn.Module, workload: Workload, parts: int, ranks: Ranks | None) -> None:
    if parts == 1 and (ranks is None or ranks.size == 1):
        return
    if not workload.samples_stand_alone:
        raise StageError(
            "training on parts of a batch",
            found=f"a loss of {type(workload).__name__} that compares the samples of a batch",
            expected="a loss that is a mean over samples",
            fix="train it in one process: leave parallel out, lower batch_size if memory is short",
        )
    norms = [name for name, child in module.named_modules() if child in set(batch_norms(module))]
    if parts > 1 and norms:
        raise StageError(
            "accumulating gradients over parts of a batch",
            found=f"batch normalisation in {norms[0]}, which takes mean and variance from each part",
            expected="a model that gives the same for a sample whatever stands beside it",
            fix="set parallel.gradient_accumulation to 1; with more parallel.processes each takes fewer samples, and "
            "mean and variance are taken over all of them",
        )


class _SharedShelf:
    """One shelf for all ranks."""

    def __init__(self, shelf: Shelf, ranks: Ranks) -> None:
        self.shelf, self.ranks, self.seconds = shelf, ranks, shelf.seconds

    def load(self, number: int) -> bytes | None:
        return self.ranks.from_first(self.shelf.load(number) if self.ranks.first else None)

    def save(self, number: int, data: bytes) -> None:
        if self.ranks.first:
            self.shelf.save(number, data)

    def tell(self, text: str) -> None:
        if self.ranks.first:
            self.shelf.tell(text)


class _Loss(nn.Module):
    """The loss as a module: its forward pass is all that uses parameters."""

    def __init__(self, module: nn.Module, loss_fn: Loss) -> None:
        super().__init__()
        self.module, self._loss_fn = module, loss_fn

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a piece."""
        return self._loss_fn(self.module, batch)


def _ddp(whole: nn.Module, ranks: Ranks) -> DistributedDataParallel:
    wrapped = DistributedDataParallel(
        whole,
        process_group=ranks.weights,
        init_sync=False,  # weights and buffers have been the first rank's since a moment ago
        find_unused_parameters=True,  # a student without a task's head, a pooler that nobody asks
        gradient_as_bucket_view=True,
    )
    wrapped.broadcast_buffers = False  # batch normalisation follows the same means at each rank

    def summed(_state: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        gradients = bucket.buffer()
        ranks.traffic.summed("parameters", gradients.nbytes)
        work = dist.all_reduce(gradients, group=ranks.weights, async_op=True)
        assert work is not None
        found: torch.futures.Future[Tensor] = work.get_future().then(_only)
        return found

    summed.__annotations__ = {}  # PyTorch compares them with types, and finds texts
    wrapped.register_comm_hook(None, summed)
    return wrapped


def _only(future: torch.futures.Future[Any]) -> Tensor:
    found: Tensor = future.value()[0]
    return found
