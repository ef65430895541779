"""What ranks do in tests; a process alone does the same."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # with the next, what DDP and FSDP import when they are first used: once for all ranks
import torch.distributed.fsdp
from torch import Tensor, nn

from modelpress.config import DistillConfig, ParallelConfig, TrainConfig
from modelpress.distill import distillation_loss, frozen, hidden_loss, recorded
from modelpress.parallel import jobs, lease
from modelpress.parallel.jobs import Job
from modelpress.parallel.rank import main as rank_main
from modelpress.parallel.ranks import Ranks, joined
from modelpress.progress import silent
from modelpress.resume import kept_on
from modelpress.train import train_
from modelpress.workload import Batch, Split
from tests.train.toy import Toy, mlp


class Blocks(nn.Module):
    """Layers in a list, and one that nothing asks."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.last = nn.Linear(width, 3)
        self.pooler = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x).tanh()
        answer: Tensor = self.last(x)
        return answer


def norms() -> nn.Module:
    """Without biases before them: their gradient is 0 but for rounding, which Adam makes large."""
    return nn.Sequential(
        nn.Linear(4, 12, bias=False), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 12, bias=False),
        nn.BatchNorm1d(12, momentum=None, affine=False), nn.Linear(12, 3),
    )  # fmt: skip


def noisy() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 12), nn.Dropout(0.5), nn.Linear(12, 3))


def large() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 256), nn.ReLU(), nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 3))


MODELS = {"mlp": mlp, "blocks": Blocks, "norms": norms, "noisy": noisy, "large": large}


class Data(Toy):
    """A toy in double precision, or with samples that one rank alone has changed."""

    def __init__(self, model: str, double: bool, spoilt: bool = False, short: bool = False, samples: int = 98) -> None:
        super().__init__(MODELS[model], samples=samples)
        self.double = double
        if spoilt:
            self.x += 1.0
        if short:
            self.rows["train"] = self.rows["train"][:-20]
        if double:
            self.x = self.x.double()

    def source(self, *_: object) -> nn.Module:
        module = super().source()
        return module.double() if self.double else module


@dataclass
class Folder:
    """A shelf on the disk, after whose n-th state the process is gone."""

    folder: Path
    cut: int = 10**9
    seconds: float = 0.0
    saved: int = 0

    def load(self, number: int) -> bytes | None:
        path = self.folder / str(number)
        return path.read_bytes() if path.exists() else None

    def save(self, number: int, data: bytes) -> None:
        (self.folder / str(number)).write_bytes(data)
        self.saved += 1
        if self.saved == self.cut:
            os._exit(9)

    def tell(self, text: str) -> None:
        with (self.folder / "told").open("a") as file:
            file.write(text + "\n")


@dataclass(frozen=True)
class Case:
    """A training: its model, its loss and its config."""

    model: str = "mlp"
    double: bool = False
    loss: str = "labels"
    """`labels`, `teacher` (soft labels and labels), `hidden` (recovery's) or `masked`."""
    train: TrainConfig = TrainConfig(epochs=2, batch_size=15, learning_rate=0.02, early_stop_epochs=2)  # noqa: RUF009
    spoilt_rank: int | None = None
    short_rank: int | None = None
    folder: str = ""
    cut: int = 10**9


@contextlib.contextmanager
def alone() -> Iterator[Ranks | None]:
    yield None


def train(who: Mapping[str, str] | None, case: Case) -> dict[str, Any]:
    """Train, as one of the ranks or (None) alone: weights, the first update's gradients and the report."""
    torch.set_num_threads(1)
    rank = int(who["RANK"]) if who else 0
    workload = Data(case.model, case.double, spoilt=rank == case.spoilt_rank, short=rank == case.short_rank)
    teacher, student = workload.source(), workload.source()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.5)
    gradients: dict[str, Any] = {}
    identities = [id(parameter) for parameter in student.parameters()]

    def look() -> None:
        for name, parameter in student.named_parameters():
            if name not in gradients and parameter.grad is not None:
                gradients[name] = parameter.grad.numpy().copy()

    fsdp = case.train.parallel.strategy == "fsdp"
    shelf = Folder(Path(case.folder), case.cut) if case.folder else None
    with joined(case.train.parallel, who) if who else alone(), contextlib.ExitStack() as stack:
        stack.enter_context(frozen(teacher))
        loss = stack.enter_context(losses(case, teacher, student, workload))
        if shelf is not None:
            stack.enter_context(kept_on(shelf))
        report = train_(student, loss, workload, case.train, after_update=None if fsdp else look)
    assert identities == [id(parameter) for parameter in student.parameters()], "other parameters than before"
    assert not any(child._forward_hooks for child in student.modules()), "hooks stayed"
    weights = {name: tensor.numpy() for name, tensor in student.state_dict().items()}
    kinds = [type(child).__name__ for child in student.modules()]
    return {"weights": weights, "gradients": gradients, "report": report.model_dump(), "kinds": kinds}


@contextlib.contextmanager
def losses(case: Case, teacher: nn.Module, student: nn.Module, workload: Data) -> Iterator[Any]:
    if case.loss == "labels":
        yield lambda module, batch: workload.loss(module(**batch.inputs), batch)
        return
    answers = distillation_loss(teacher, workload, DistillConfig(alpha=0.5))
    if case.loss == "teacher":
        yield answers
        return
    layers = [list(one.get_submodule("body.layers").children()) for one in (teacher, student)]
    with recorded(layers[0]) as taught, recorded(layers[1]) as learned:

        def loss(module: nn.Module, batch: Batch) -> Tensor:
            value = answers(module, batch)
            states = [[one.unsqueeze(1) for one in held] for held in (taught, learned)]
            # A sample counts or not by its own values: ranks have different numbers of those that do.
            mask = (batch.inputs["x"][:, :1] > 0).to(value.dtype) if case.loss == "masked" else None
            return value + hidden_loss(states[0], states[1], mask, relative=case.loss == "hidden")

        yield loss


def spread(processes: int, **ways: Any) -> ParallelConfig:
    return ParallelConfig(processes=processes, **({"timeout_seconds": 120.0} if processes > 1 else {}), **ways)


def read_hands(who: Mapping[str, str], how: str, split: Split = "train") -> list[tuple[list[list[float]], float, int]]:
    """The samples of each piece that a rank gets, with its share, by each distribution."""
    from modelpress.parallel.data import hands

    workload = Data("mlp", double=False, samples=46)
    with joined(spread(2), who) as ranks:
        batches = workload.batches(split, 7, 3) if how != "stream" or ranks.first else None
        found = [
            (piece.batch.inputs["x"].tolist(), piece.share, hand.samples)
            for hand in hands(batches, ranks, 2, how, "reading")  # type: ignore[arg-type]
            for piece in hand.pieces
        ]
        assert how == "stream" or not ranks.traffic.needed["data"]
    return found


class Slow(Toy):
    """A toy whose batches take a while: there is time to kill somebody."""

    def __init__(self, pause: float = 0.0, samples: int = 96) -> None:
        super().__init__(samples=samples)
        self.pause = pause

    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        for batch in super().batches(split, batch_size, seed):
            time.sleep(self.pause if split == "train" else 0.0)
            yield batch


def work(who: Mapping[str, str], job: Job) -> bytes:
    """The output of a job, as one of its ranks."""
    with joined(job.parallel, who):
        return jobs.work(job, silent)[0]


def be_rank(who: Mapping[str, str], folder: str, patience: float | None = None) -> int:
    """What torchrun would start; it looks often whether anybody waits for it."""
    os.environ.update(who)
    lease.LOOK_SECONDS = 0.1
    return rank_main(folder, patience)
