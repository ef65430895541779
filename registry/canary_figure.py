"""The plot of a canary: how the evidence of each test grew, from what its looks logged in MLflow. Without a display."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from modelpress.canary.decide import Finding, Test
from modelpress.errors import NotFoundError, SetupError
from registry import runs, versions
from registry.canaries import TAGS, Looked

ARTIFACT = "canary/evidence.png"
KEPT, BROKEN = "#4f8a5b", "#c8752d"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Course:
    """How one test went: evidence by seconds since the canary began."""

    seconds: list[int]
    broken: list[float]
    kept: list[float]


def log(client: MlflowClient, looked: Looked) -> None:
    """Draw a canary that has ended, and keep the plot with the candidate's run; what MLflow refuses is logged."""
    try:
        runs.check_server(client.tracking_uri)
        run_id = versions.carrying(client, looked.name, looked.candidate).run_id
        courses = {one.test: _course(client, run_id, one.test) for one in looked.findings}
        title = f"{looked.name}@{looked.alias}, pack {looked.candidate[:12]}: {looked.phase}"
        client.log_figure(run_id, draw(courses, looked.findings, title), ARTIFACT)
    except (MlflowException, SetupError, NotFoundError) as error:
        logger.warning("MLflow has no plot of the canary of %s@%s: %s", looked.name, looked.alias, error)


def draw(courses: Mapping[Test, Course], findings: list[Finding], title: str) -> Figure:
    """One plot per test: both evidences, and where they decide."""
    figure = Figure(figsize=(5.0 * len(findings), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left")
    for axes, one in zip(np.atleast_1d(figure.subplots(1, len(findings))), findings, strict=True):
        _draw_one(axes, courses[one.test], one)
    return figure


def _draw_one(axes: Axes, course: Course, one: Finding) -> None:
    minutes = [second / 60 for second in course.seconds]
    axes.plot(minutes, course.broken, color=BROKEN, label="that the bound is broken")
    axes.plot(minutes, course.kept, color=KEPT, label="that it is kept")
    axes.axhline(one.alarm_at, color=BROKEN, linestyle="--", linewidth=1, label="alarm")
    axes.axhline(one.clear_at, color=KEPT, linestyle="--", linewidth=1, label="clear")
    # Evidence against may fall without end, and says no more below the other's height.
    high = max([one.alarm_at, *course.broken, *course.kept]) * 1.1
    axes.set_ylim(-high, high)
    axes.set_title(f"{one.test}: {one.verdict}", loc="left")
    axes.set_xlabel("minutes since the canary began")
    axes.set_ylabel("ln evidence")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7)


def _course(client: MlflowClient, run_id: str, test: str) -> Course:
    """Of the newest canary of this run: an earlier one's seconds were counted from another start."""
    histories = [client.get_metric_history(run_id, f"{TAGS}{test}.{key}") for key in ("evidence", "evidence_kept")]
    broken, kept = (sorted(one, key=lambda metric: metric.timestamp) for one in histories)
    began = max((at for at in range(1, len(broken)) if broken[at].step < broken[at - 1].step), default=0)
    return Course(
        [metric.step for metric in broken[began:]],
        [metric.value for metric in broken[began:]],
        [metric.value for metric in kept[began:]],
    )
