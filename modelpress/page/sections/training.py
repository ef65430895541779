"""How the trainings of a run went: loss by epoch and, where several processes trained, what they sent each other."""

from __future__ import annotations

from collections.abc import Sequence

from modelpress.page import words
from modelpress.page.parts import Figure, Section, Table
from modelpress.page.plots import Dot, Spot, dots, scatter
from modelpress.page.story import Story
from modelpress.reports import (
    DistillReport,
    ParallelReport,
    PlanReport,
    PruneReport,
    QuantizeReport,
    Report,
    TrainReport,
    trainings,
)

KINDS: dict[str, type[Report]] = {
    "distill": DistillReport,
    "prune": PruneReport,
    "quantize": QuantizeReport,
    "plan": PlanReport,
}
"""Stages that may train, and their reports."""
DRAWN = 6
"""Curves of a plot; gradual pruning trains after each of its steps."""
POINTS, TOLD = 200, 40
"""Epochs of a curve that are drawn, and that are in the table behind it."""
Named = tuple[str, TrainReport]
Spread = tuple[str, ParallelReport]


def section(story: Story) -> Section | None:
    """Losses of each training, and the bytes of those that were spread over processes."""
    found = _trainings(story)
    if not found:
        return None
    spread = [(label, one.parallel) for label, one in found if one.parallel is not None]
    lead = ["Mean loss per epoch of every training in this run: of a student, and of what recovers after a stage."]
    if spread:
        lead.append(
            "Bytes are those that the first rank had to send, as a ring needs them, since the training's last start. "
            "The least is 2(N−1)/N of the gradients for each update; the wire is what its sockets sent, if they tell."
        )
    return Section(
        key="training",
        title="How it was trained",
        lead=lead,
        figures=[figure for figure in (_losses(found), _traffic(spread)) if figure is not None],
        tables=[_summary(found), *([_updates(spread)] if spread else [])],
    )


def _trainings(story: Story) -> list[Named]:
    found: list[Named] = []
    for stage, kind in KINDS.items():
        report = story.report(stage, kind)
        trained = trainings(report) if report is not None else []
        several = len(trained) > 1
        found += [(f"{stage} {number}" if several else stage, one) for number, one in enumerate(trained, 1)]
    return found


def _losses(found: Sequence[Named]) -> Figure | None:
    drawn = [(label, one.losses) for label, one in found if len(one.losses) > 1][:DRAWN]
    if not drawn:
        return None
    values = [loss for _, losses in drawn for loss in losses]
    rows = [[label, f"{epoch:,}", f"{loss:.5g}"] for label, losses in drawn for epoch, loss in _thinned(losses, TOLD)]
    key = "training-losses"
    alt = "Loss by epoch: " + "; ".join(f"{label} from {losses[0]:.3g} to {losses[-1]:.3g}" for label, losses in drawn)
    return Figure(
        key=key,
        caption="Mean loss by epoch; trainings differ in what their loss is, so compare a curve with itself alone",
        svg=scatter(
            key,
            alt,
            {label: [Spot(float(epoch), loss) for epoch, loss in _thinned(losses, POINTS)] for label, losses in drawn},
            None,
            axes_named=("epoch", "mean loss"),
            logs=(False, min(values) > 0 and max(values) / min(values) > 20),
            joined=frozenset(label for label, _ in drawn),
        ),
        table=Table("Loss by epoch", ["training", "epoch", "mean loss"], rows, numbers=frozenset({1, 2})),
    )


def _thinned(losses: Sequence[float], most: int) -> list[tuple[int, float]]:
    """At most about so many epochs and their losses, evenly, and the last one."""
    step = -(-len(losses) // most)
    return [(epoch, loss) for epoch, loss in enumerate(losses, 1) if epoch % step == 1 % step or epoch == len(losses)]


def _summary(found: Sequence[Named]) -> Table:
    rows = [
        [
            label,
            f"{one.epochs:,}" + (", stopped early" if one.stopped_early else ""),
            f"{one.updates:,}",
            f"{one.first_loss:.5g}",
            f"{one.final_loss:.5g}",
            words.number(one.best_validation_loss),
            f"in {one.batch_parts} parts" if one.batch_parts is not None else "–",
            f"{one.parallel.processes} × {one.parallel.strategy}" if one.parallel is not None else "1",
        ]
        for label, one in found
    ]
    heads = [
        "training",
        "epochs",
        "updates",
        "first loss",
        "last loss",
        "best validation loss",
        "batches cut",
        "processes",
    ]
    return Table("Trainings", heads, rows, frozenset(range(1, 6)))


def _traffic(spread: Sequence[Spread]) -> Figure | None:
    if not spread:
        return None
    kinds = ("parameters", "data", "control")
    sent = [(label, {kind: getattr(one.traffic, f"{kind}_bytes") for kind in kinds}) for label, one in spread]
    series = {kind: [Dot(label, float(found[kind])) for label, found in sent if found[kind] > 0] for kind in kinds}
    rows = [[label, *(words.exact_bytes(found[kind]) for kind in kinds)] for label, found in sent]
    series = {kind: found for kind, found in series.items() if found}
    table = Table("Bytes communicated", ["training", *kinds], rows, frozenset({1, 2, 3}))
    key = "training-traffic"
    if not series:
        return None
    return Figure(
        key=key,
        caption="Bytes communicated by each training: weights and gradients, samples, what keeps the ranks together",
        svg=dots(
            key,
            "Bytes communicated: " + "; ".join(f"{row[0]} {row[1]} for parameters" for row in rows),
            [label for label, _ in sent],
            series,
            unit="bytes",
            log=True,
        ),
        table=table,
    )


def _updates(spread: Sequence[Spread]) -> Table:
    rows = [
        [
            label,
            f"{one.processes} × {one.strategy}, {one.backend}",
            words.exact_bytes(one.least_update_bytes),
            words.exact_bytes(one.needed_update_bytes),
            words.exact_bytes(one.wire_update_bytes),
            f"{one.traffic_ratio:.3f}" if one.traffic_ratio is not None else words.UNMEASURED,
            "the same bits" if one.weights_agree else "different bits",
            f"{one.restarts:,}",
        ]
        for label, one in spread
    ]
    heads = [
        "training",
        "spread",
        "least per update",
        "a ring needs",
        "on the wire",
        "over the least",
        "ranks ended with",
    ]
    return Table("Bytes of an update", [*heads, "restarts"], rows, frozenset({2, 3, 4, 5, 7}))
