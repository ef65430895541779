"""Gradient descent: one loop for source models, students and recovery after pruning."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from modelpress import memory
from modelpress.config import TrainConfig
from modelpress.errors import OutOfMemoryError, StageError
from modelpress.progress import Progress, silent
from modelpress.reports import TrainReport
from modelpress.workload import Batch, Split, Workload

LossFn = Callable[[nn.Module, Batch], Tensor]
"""Scalar loss of a module on a batch; the batch is on the module's device."""

SEED_STRIDE = 1_000_003
"""Parts the seeds of epochs: no epoch of one seed shares its order with an epoch of a near seed."""


def train_(
    module: nn.Module,
    loss_fn: LossFn,
    workload: Workload,
    config: TrainConfig,
    progress: Progress = silent,
    after_update: Callable[[], None] | None = None,
) -> TrainReport:
    """Train `module` in place on the workload's training split; it comes back in eval mode.

    Equal seeds give equal weights on one machine. The global random state is the same after as before. With early
    stop, the weights of the epoch with the least calibration loss stay.

    Args:
        module: parameters with `requires_grad` are updated.
        loss_fn: see `LossFn`.
        workload: gives the training batches, and the calibration batches for early stop.
        config: optimizer, schedule and duration.
        progress: called once per update.
        after_update: called after each update (pruning holds its zeros with it).

    Raises:
        StageError: nothing to train, no data, or a loss that is NaN or infinite.
        OutOfMemoryError: a batch, or with `out_of_memory: halve` a single sample, did not fit.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise StageError("training", found="no parameter that requires a gradient", expected="at least one")
    devices = sorted({parameter.device.index or 0 for parameter in parameters if parameter.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        # With a seed, as the updates are made: a workload may cut seeded batches otherwise.
        first_epoch = workload.batches("train", config.batch_size, epoch_seed(config, 0))
        updates_per_epoch = sum(1 for _ in first_epoch)
        if not updates_per_epoch:
            raise StageError("training", found="an empty training split", expected="at least one sample")
        torch.manual_seed(config.seed)
        loop = _Loop(module, loss_fn, workload, config, progress, after_update, updates_per_epoch)
        report = loop.run()
    module.eval()
    return report


class _Loop:
    """The state of one training: optimizer, schedule, best weights."""

    def __init__(
        self,
        module: nn.Module,
        loss_fn: LossFn,
        workload: Workload,
        config: TrainConfig,
        progress: Progress,
        after_update: Callable[[], None] | None,
        updates_per_epoch: int,
    ) -> None:
        self.module, self.loss_fn, self.workload, self.config = module, loss_fn, workload, config
        self.progress, self.after_update = progress, after_update
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.device = self.parameters[0].device
        self.optimizer = make_optimizer(self.parameters, config)
        self.total = config.epochs * updates_per_epoch
        self.updates = 0
        self.parts = 1
        self.memory_errors: list[str] = []
        self.may_cut = config.out_of_memory == "halve" and workload.samples_stand_alone
        self.started = time.monotonic()

    def run(self) -> TrainReport:
        losses: list[float] = []
        best, best_state, stale, stopped = math.inf, None, 0, False
        for epoch in range(self.config.epochs):
            losses.append(self._epoch(epoch))
            if not self.config.early_stop_epochs:
                continue
            validation = self._validation_loss(epoch)
            if validation < best:
                best, stale = validation, 0
                best_state = {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}
            else:
                stale += 1
            if stale >= self.config.early_stop_epochs:
                stopped = epoch + 1 < self.config.epochs
                break
        if best_state is not None:
            self.module.load_state_dict(best_state)
        if stopped:
            self.progress(self.total, self.total, f"stopped after epoch {len(losses)}: calibration loss {best:.4f}")
        return TrainReport(
            epochs=len(losses),
            updates=self.updates,
            first_loss=losses[0],
            final_loss=losses[-1],
            best_validation_loss=best if best_state is not None else None,
            stopped_early=stopped,
            losses=losses,
            batch_parts=self.parts if self.parts > 1 else None,
            memory_errors=self.memory_errors,
        )

    def _epoch(self, epoch: int) -> float:
        """One pass over the training split; the mean loss per sample."""
        self.module.train()
        total, samples = 0.0, 0
        for batch in self._batches("train", epoch_seed(self.config, epoch)):
            loss = self._update(batch, epoch)
            total, samples = total + loss * len(batch), samples + len(batch)
            rate = self.updates / (time.monotonic() - self.started)
            note = f"epoch {epoch + 1}/{self.config.epochs}: loss {total / samples:.4f}, {rate:.1f} updates/s"
            note += f", batches in {self.parts} parts: memory ran out" if self.parts > 1 else ""
            self.progress(self.updates, self.total, note)
        return total / samples

    def _update(self, batch: Batch, epoch: int) -> float:
        factor = schedule(self.config, self.updates, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor
        value = self._gradients(batch, f"epoch {epoch + 1}, update {self.updates + 1}")
        if self.config.max_grad_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.updates += 1
        if self.after_update is not None:
            self.after_update()
        return value

    def _gradients(self, batch: Batch, where: str) -> float:
        """Leave the gradients of a batch's loss, which is returned; in smaller parts, where the config allows, when
        memory does not hold it.

        A part's loss counts by its samples: the sum is the batch's own for a loss that is a mean over samples. What a
        layer takes from the whole batch, such as batch normalisation, it takes from each part.
        """
        while True:
            state = torch.get_rng_state() if self.may_cut else None
            try:
                return self._in_parts(batch, where)
            except (MemoryError, RuntimeError) as error:
                if not memory.ran_out(error):
                    raise
                found = f"{where}: {memory.described(error)}"
                if state is None or self.parts >= len(batch):
                    raise self._too_large(batch, where, found) from error
            # Out of the handler: the traceback no longer holds what the attempt made.
            torch.set_rng_state(state)  # the same noise, but for dropout on a GPU, whose generator goes on
            self.parts = min(2 * self.parts, len(batch))
            self.memory_errors.append(found)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _in_parts(self, batch: Batch, where: str) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part in batch.cut(self.parts):
            share = len(part) / len(batch)
            loss = self.loss_fn(self.module, part) * share
            total += self._finite(float(loss.detach()), where)
            loss.backward()  # type: ignore[no-untyped-call]
        return total

    def _too_large(self, batch: Batch, where: str, found: str) -> OutOfMemoryError:
        at_once = -(-len(batch) // self.parts)
        if self.may_cut:
            way = ""
        elif self.workload.samples_stand_alone:
            way = "let batches be cut (train.out_of_memory: halve), "
        else:
            way = f"(batches of {type(self.workload).__name__} cannot be cut: its loss compares their samples) "
        return OutOfMemoryError(
            f"training ({where}) on {at_once} of a batch's {len(batch)} samples at once",
            found=found.removeprefix(f"{where}: "),
            fix=f"{way}lower train.batch_size (now {self.config.batch_size}), or train where there is more memory",
        )

    def _validation_loss(self, epoch: int) -> float:
        """Mean loss per sample on the calibration split, in eval mode."""
        self.module.eval()
        total, samples = 0.0, 0
        with torch.no_grad():
            for batch in self._batches("calibration", None):
                total += float(self.loss_fn(self.module, batch)) * len(batch)
                samples += len(batch)
        return self._finite(total / samples, f"epoch {epoch + 1}, calibration")

    def _batches(self, split: Split, seed: int | None) -> Iterator[Batch]:
        for batch in self.workload.batches(split, self.config.batch_size, seed):
            inputs = {name: tensor.to(self.device) for name, tensor in batch.inputs.items()}
            yield Batch(inputs, None if batch.targets is None else batch.targets.to(self.device))

    def _finite(self, loss: float, where: str) -> float:
        if not math.isfinite(loss):
            raise StageError(
                f"training ({where})",
                found=f"loss {loss}",
                expected="a finite loss",
                fix=f"lower train.learning_rate (now {self.config.learning_rate:g}), set train.max_grad_norm, or look "
                "for NaN and infinity in the data",
            )
        return loss


def epoch_seed(config: TrainConfig, epoch: int) -> int:
    """Seed of the order of an epoch's batches."""
    return config.seed * SEED_STRIDE + epoch


def make_optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that a config names; `momentum` is β₁ of Adam and AdamW."""
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=config.momentum, weight_decay=decay)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=rate, betas=(config.momentum, 0.999), weight_decay=decay)


def schedule(config: TrainConfig, update: int, total: int) -> float:
    """Learning rate of an update (counted from 0) as a share of the peak: linear warm-up, then the schedule's decay.

    The first update of a warm-up is not lost on a rate of 0, and a decay reaches 0 only after the last; there it stays
    where an epoch has more batches than the first had.
    """
    warmup = round(config.warmup_fraction * total)
    if update < warmup:
        return (update + 1) / (warmup + 1)
    position = min(1.0, (update - warmup) / max(1, total - warmup))
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * position))
    return 1.0 - position if config.schedule == "linear" else 1.0
