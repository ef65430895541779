"""What could have been chosen and what was: the plan's front, and quality against bytes over the stages."""

from __future__ import annotations

from itertools import groupby

from modelpress.page import words
from modelpress.page.parts import Figure, Section, Table, listed
from modelpress.page.plots import Spot, scatter
from modelpress.page.story import Story
from modelpress.reports import PlanPoint, PlanReport

LISTED = 80


def section(story: Story) -> Section | None:
    """The front of the plan, where there was one; else, and beside it, what the stages made of bytes and quality."""
    plan = story.report("plan", PlanReport)
    figures = [figure for figure in [_front(plan) if plan else None, _stages(story)] if figure is not None]
    if not figures:
        return None
    lead = [_said(plan)] if plan else ["This run had no plan: the stages are the points that were measured."]
    return Section(key="choice", title="What could have been chosen", lead=lead, figures=figures)


def _said(plan: PlanReport) -> str:
    what = "coded bytes" if plan.objective == "bytes" else "time of a call"
    return (
        f"The plan makes the {what} least within a disagreement of {plan.max_disagreement:.3g} with the float graph. "
        f"It came to {plan.disagreement:.3g} on calibration data, {plan.predicted_disagreement:.3g} were foretold, and "
        f"{plan.held_out_disagreement:.3g} were found on held-out data. "
        f"{plan.coverage:.1%} of the eligible weights are planned, by {plan.measurements:,} measurements."
    )


def _front(plan: PlanReport) -> Figure:
    timed = plan.seconds is not None

    def spot(point: PlanPoint) -> Spot:
        return Spot((point.seconds or 0.0) * 1000 if timed else float(point.coded_bytes), point.disagreement)

    series = {"planned": [spot(point) for point in plan.front]}
    alike = sorted(plan.uniform, key=lambda point: _kind(point, timed))
    for kind, points in groupby(alike, key=lambda point: _kind(point, timed)):
        series[kind] = [spot(point) for point in points]
    chosen = Spot((plan.seconds or 0.0) * 1000 if timed else float(plan.coded_bytes), plan.disagreement)
    meaning = "mean KL divergence, nats" if plan.divergence == "kl" else "1 − mean cosine"
    cost = "milliseconds of a call" if timed else "coded bytes"
    alt = (
        f"{len(plan.front)} plans and {len(plan.uniform)} uniform settings by {cost} and disagreement; the chosen plan "
        f"is at {chosen.x:.6g} and {chosen.y:.3g}"
    )
    return Figure(
        key="choice-front",
        caption=f"Cost against disagreement with the float graph ({meaning}) on calibration data; a star is the plan, "
        "marks without a line are one form for all weights",
        svg=scatter(
            "choice-front",
            alt,
            series,
            ("the plan", chosen),
            axes_named=(cost, "disagreement"),
            logs=(not timed, True),
            joined=frozenset({"planned"}),
            limit=(plan.max_disagreement, "budget"),
        ),
        table=_points(plan),
    )


def _kind(point: PlanPoint, timed: bool) -> str:
    """What a uniform setting shares with others: of "5 bits, scale per channel" all but the bits; of a kernel, all."""
    return point.label if timed else point.label.partition(", ")[2] or point.label


def _points(plan: PlanReport) -> Table:
    points = sorted([*plan.front, *plan.uniform], key=lambda point: (point.seconds or 0.0, point.coded_bytes))
    rows = [
        [
            words.cut(point.label, 80),
            f"{point.coded_bytes:,}",
            words.time(point.seconds),
            f"{point.disagreement:.3e}",
            "–" if point.predicted_disagreement is None else f"{point.predicted_disagreement:.3e}",
        ]
        for point in points
    ]
    heads = ["choice", "coded bytes", "time of a call", "disagreement", "foretold"]
    return listed("Plans that were built and measured", heads, rows, LISTED, frozenset(range(1, 5)))


def _stages(story: Story) -> Figure | None:
    """Quality against bytes of each judged stage."""
    judged = [
        (stage, stage.evaluation.quality)
        for stage in story.stages
        if stage.evaluation is not None and stage.size_bytes and stage.stage != "source (onnx)"
    ]
    if len(judged) < 2:
        return None
    spots = [Spot(float(stage.size_bytes or 0), found.value, stage.stage) for stage, found in judged]
    served = story.run.served if story.run is not None else None
    at = next((spot for spot in spots if spot.label == served), None)
    rows = [[stage.stage, f"{stage.size_bytes:,}", words.quality(found)] for stage, found in judged]
    metric = judged[0][1].metric
    return Figure(
        key="choice-stages",
        caption="Bytes and quality after each stage that changes the model; the star is what is served",
        svg=scatter(
            "choice-stages",
            f"{metric} against bytes: " + ", ".join(f"{row[0]} {row[1]} bytes {row[2]}" for row in rows),
            {"stages": spots},
            ("served", Spot(at.x, at.y)) if at is not None else None,
            axes_named=("bytes", metric),
            logs=(True, False),
        ),
        table=Table("Bytes and quality", ["stage", "bytes", "quality"], rows, numbers=frozenset({1, 2})),
    )
