"""Gradient descent: one loop for source models, students and recovery after pruning."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from modelpress import memory
from modelpress.config import TrainConfig
from modelpress.errors import CorruptionError, OutOfMemoryError, StageError
from modelpress.parallel.data import SAME_DATA, Hand, check_equal, hands
from modelpress.parallel.training import Alone, spread
from modelpress.parallel.turn import Turn, taken
from modelpress.progress import Progress, silent
from modelpress.reports import TrainReport
from modelpress.resume import Place, next_place
from modelpress.training_state import Live, Position, Random, keeps_more_than_tensors
from modelpress.workload import Batch, Split, Workload

LossFn = Callable[[nn.Module, Batch], Tensor]
"""Scalar loss of a module on a batch; the batch is on the module's device."""

SEED_STRIDE = 1_000_003
"""Parts the seeds of epochs: no epoch of one seed shares its order with an epoch of a near seed."""
KEEPING_SHARE = 0.05
"""Share of the time that keeping the state may take."""


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
    stop, the weights of the epoch with the least calibration loss stay. Within `resume.kept_on` the state is kept from
    time to time, and a training that was cut off goes on from there to the same weights. Within `parallel.ranks.joined`
    each of the ranks calls this, with the same arguments: `config.batch_size` is of all of them together.

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
    place = next_place()
    devices = sorted({parameter.device.index or 0 for parameter in parameters if parameter.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), spread(module, loss_fn, workload, config) as way:
        if way.shards and after_update is not None:
            raise StageError(
                "training with parallel.strategy 'fsdp'",
                found="weights that are held as they are after each update (zeros of a pruned model)",
                expected="nothing that looks at whole weights, of which each rank has a part",
                fix="set parallel.strategy to ddp",
            )
        updates_per_epoch = _count_updates(workload, config, way)
        torch.manual_seed(config.seed)
        loop = _Loop(module, workload, config, way, progress, after_update, updates_per_epoch, place)
        report = loop.run()
    module.eval()
    return report


def _count_updates(workload: Workload, config: TrainConfig, way: Alone) -> int:
    """Of an epoch, the same at each rank; counted where the data are read."""
    # With a seed, as the updates are made: a workload may cut seeded batches otherwise.
    here = way.ranks is None or way.ranks.first or config.parallel.data == "slice"
    found = sum(1 for _ in workload.batches("train", config.batch_size, epoch_seed(config, 0))) if here else 0
    if way.ranks is not None and config.parallel.data == "slice":
        check_equal(way.ranks, found, "counting the updates of an epoch", "updates", SAME_DATA)
    elif way.ranks is not None:
        found = round(way.sum(found)[0])
    if not found:
        raise StageError("training", found="an empty training split", expected="at least one sample")
    return found


class _Loop:
    """The state of one training: optimizer, schedule, best weights, and how far it is."""

    def __init__(
        self,
        module: nn.Module,
        workload: Workload,
        config: TrainConfig,
        way: Alone,
        progress: Progress,
        after_update: Callable[[], None] | None,
        updates_per_epoch: int,
        place: Place | None,
    ) -> None:
        self.module, self.workload, self.config, self.way = module, workload, config, way
        self.progress, self.after_update = progress, after_update
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.device = self.parameters[0].device
        self.optimizer = make_optimizer(self.parameters, config)
        self.total = config.epochs * updates_per_epoch
        self.at = Position()
        self.best_state: dict[str, Tensor] | None = None
        self.random: Random | None = None  # to go on with, behind the batches that a cut-off training had had
        self.keeper = _Keeper(way.place(place), self, updates_per_epoch) if place is not None else None
        self.may_cut = config.out_of_memory == "halve" and workload.samples_stand_alone
        self.started, self.earlier_updates = time.monotonic(), self.at.updates

    def run(self) -> TrainReport:
        at = self.at
        while not at.done and not at.stopped and at.epoch < self.config.epochs:
            at.losses.append(self._epoch())
            if self.config.early_stop_epochs:
                self._judge()
            at.epoch, at.batches, at.samples, at.loss_sum = at.epoch + 1, 0, 0, 0.0
        if self.best_state is not None:
            self.module.load_state_dict(self.best_state)
        if self.keeper is not None and not at.done:
            self.keeper.keep_end()
        stopped = at.stopped and at.epoch < self.config.epochs
        if stopped:
            self.progress(self.total, self.total, f"stopped after epoch {at.epoch}: calibration loss {at.best:.4f}")
        return TrainReport(
            epochs=at.epoch,
            updates=at.updates,
            first_loss=at.losses[0],
            final_loss=at.losses[-1],
            best_validation_loss=at.best,
            stopped_early=stopped,
            losses=list(at.losses),
            batch_parts=at.parts if at.parts > 1 else None,
            memory_errors=list(at.memory_errors),
            parallel=self.way.report(at.updates - self.earlier_updates),
        )

    def _judge(self) -> None:
        """Keep the weights if the calibration loss was never lower; stop if it has not been for long."""
        at = self.at
        validation = self._validation_loss(at.epoch)
        if at.best is None or validation < at.best:
            at.best, at.stale = validation, 0
            self.best_state = {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}
        else:
            at.stale += 1
        at.stopped = at.stale >= self.config.early_stop_epochs

    def _epoch(self) -> float:
        """One pass over the training split, or the rest of one; the mean loss per sample."""
        self.module.train()
        at = self.at
        hands = self._hands("train", epoch_seed(self.config, at.epoch), at.batches)
        for hand in hands:
            loss = self._update(hand, at.epoch)
            at.loss_sum, at.samples, at.batches = (
                at.loss_sum + loss * hand.samples,
                at.samples + hand.samples,
                at.batches + 1,
            )
            rate = (at.updates - self.earlier_updates) / (time.monotonic() - self.started)
            mean = at.loss_sum / at.samples
            note = f"epoch {at.epoch + 1}/{self.config.epochs}: loss {mean:.4f}, {rate:.1f} updates/s"
            note += f", batches in {at.parts} parts: memory ran out" if at.parts > 1 else ""
            self.progress(at.updates, self.total, note)
            if self.keeper is not None:
                self.keeper.keep_now_and_then()
        return at.loss_sum / at.samples

    def _hands(self, split: Split, seed: int | None, skip: int = 0) -> Iterator[Hand]:
        """What this process computes of each batch, behind those that were learned from before; the random numbers of
        a training that was cut off are taken up from there."""
        ways, ranks = self.config.parallel, self.way.ranks
        batches: Iterator[Batch] | None = None
        if ranks is None or ranks.first or ways.data == "slice":
            batches = self.workload.batches(split, self.config.batch_size, seed)
            self._skip(batches, skip)
        if self.random is not None:
            self.random.set(self.device)
            self.random = None
        return hands(batches, ranks, ways.gradient_accumulation, ways.data, f"reading the {split} split")

    def _skip(self, batches: Iterator[Batch], count: int) -> None:
        skipped = sum(1 for _ in itertools.islice(batches, count))
        if skipped < count:
            raise StageError(
                f"going on with epoch {self.at.epoch + 1} of a training that was cut off",
                found=f"{skipped} batches in it",
                expected=f"more than the {count} that it had had",
                fix="`Workload.batches` must give the same batches for the same seed; delete what lies under "
                "training/ in the work store to begin anew",
            )

    def _update(self, hand: Hand, epoch: int) -> float:
        factor = schedule(self.config, self.at.updates, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor
        self.way.noise(self.config.seed, self.at.updates)
        (value,) = self.way.sum(self._gradients(hand, f"epoch {epoch + 1}, update {self.at.updates + 1}"))
        if self.config.max_grad_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.at.updates += 1
        if self.after_update is not None:
            self.after_update()
        return value

    def _gradients(self, hand: Hand, where: str) -> float:
        """Leave the gradients of a batch's loss, which is returned; in smaller parts, where the config allows, when
        memory does not hold it.

        A part's loss counts by its samples: the sum is the batch's own for a loss that is a mean over samples. What a
        layer takes from the whole batch, such as batch normalisation, it takes from each part.
        """
        most = max(len(piece.batch) for piece in hand.pieces)
        while True:
            state = torch.get_rng_state() if self.may_cut else None
            try:
                return self._in_parts(hand, where)
            except (MemoryError, RuntimeError) as error:
                if not memory.ran_out(error):
                    raise
                found = f"{where}: {memory.described(error)}"
                if state is None or self.at.parts >= most:
                    raise self._too_large(most, hand.samples, where, found) from error
            # Out of the handler: the traceback no longer holds what the attempt made.
            torch.set_rng_state(state)  # the same noise, but for dropout on a GPU, whose generator goes on
            self.at.parts = min(2 * self.at.parts, most)
            self.at.memory_errors.append(found)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _in_parts(self, hand: Hand, where: str) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        parts = [
            (part, piece.share * (len(part) / len(piece.batch)))
            for piece in hand.pieces
            for part in piece.batch.cut(self.at.parts)
        ]
        total = 0.0
        for number, (part, share) in enumerate(parts, start=1):
            with self.way.step(last=number == len(parts)), self._turn(share):
                loss = self.way.loss(self._here(part)) * share
                total += self._finite(float(loss.detach()), where)
                loss.backward()  # type: ignore[no-untyped-call]
        return total

    def _turn(self, share: float) -> AbstractContextManager[None]:
        ranks = self.way.ranks if self.way.ranks is not None and self.way.ranks.size > 1 else None
        return taken(Turn(share, self.config.parallel.gradient_accumulation, ranks))

    def _too_large(self, most: int, samples: int, where: str, found: str) -> OutOfMemoryError:
        at_once = -(-most // self.at.parts)
        if self.may_cut:
            way = ""
        elif self.way.ranks is not None:
            way = f"raise parallel.gradient_accumulation (now {self.config.parallel.gradient_accumulation}), "
        elif self.workload.samples_stand_alone:
            way = "let batches be cut (train.out_of_memory: halve), "
        else:
            way = f"(batches of {type(self.workload).__name__} cannot be cut: its loss compares their samples) "
        return OutOfMemoryError(
            f"training ({where}) on {at_once} of a batch's {samples} samples at once",
            found=found.removeprefix(f"{where}: "),
            fix=f"{way}lower train.batch_size (now {self.config.batch_size}), or train where there is more memory",
        )

    def _validation_loss(self, epoch: int) -> float:
        """Mean loss per sample on the calibration split, in eval mode."""
        self.module.eval()
        total, samples = 0.0, 0
        with torch.no_grad():
            for hand in self._hands("calibration", None):
                for piece in hand.pieces:
                    with self._turn(piece.share):
                        total += float(self.way.loss(self._here(piece.batch))) * piece.share * hand.samples
                samples += hand.samples
        (total,) = self.way.sum(total)
        return self._finite(total / samples, f"epoch {epoch + 1}, calibration")

    def _here(self, batch: Batch) -> Batch:
        inputs = {name: tensor.to(self.device) for name, tensor in batch.inputs.items()}
        return Batch(inputs, None if batch.targets is None else batch.targets.to(self.device))

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


class _Keeper:
    """Puts a loop's state on its place now and then, and takes it up from there when the loop is made."""

    def __init__(self, place: Place, loop: _Loop, updates_per_epoch: int) -> None:
        self.place, self.loop = place, loop
        self.live = Live(loop.module, loop.parameters, loop.optimizer, loop.device)
        self.off = bool(unlike := keeps_more_than_tensors(loop.module))
        if self.off:
            place.shelf.tell(f"the training keeps no state: {', '.join(unlike)} of the model has one that is no tensor")
            return
        self.about = self.live.describe(loop.config, updates_per_epoch)
        self.began = self.kept = time.monotonic()
        self.pause = place.shelf.seconds
        self._take_up()

    def _take_up(self) -> None:
        data = self.place.load()
        if data is None:
            return
        loop, tell = self.loop, self.place.shelf.tell
        try:
            loop.at, loop.best_state, loop.random = self.live.restore_(data, self.about)
        except CorruptionError as error:
            tell(f"the training begins anew, as what is kept of an earlier one is of no use: {error}")
            return
        how = "was done before" if loop.at.done else f"goes on behind update {loop.at.updates} of {loop.total}"
        tell(f"the training {how}")

    def keep_now_and_then(self) -> None:
        """Keep the state where the time has come: it takes at most `KEEPING_SHARE` of the training's."""
        if not self.off and self.loop.way.first(time.monotonic() - self.kept >= self.pause):
            self._keep()

    def keep_end(self) -> None:
        """Keep the weights at the end, as the stage is not at its own: unless the training was short."""
        if not self.off and self.loop.way.first(time.monotonic() - self.began >= self.place.shelf.seconds):
            self.loop.at.done = True
            self._keep()

    def _keep(self) -> None:
        began = time.monotonic()
        if self.loop.way.keeps:
            self.place.save(self.live.to_bytes(self.about, self.loop.at, self.loop.best_state))
        self.kept = time.monotonic()
        if self.place.shelf.seconds:
            self.pause = max(self.place.shelf.seconds, (self.kept - began) / KEEPING_SHARE)


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
