"""One search that spends a quality budget where it saves the most published bytes, or the most time.

For bytes, every weight of a float graph is given its own bits, its own sharing of scales and its own zeros: those with
which all together agree with the float graph as closely as asked, in the fewest bytes after lossless coding. The graph
still computes in float. For time, every product is given the kernel that is measured to serve best.
"""

from __future__ import annotations

from modelpress.checkpoint import Checkpoint
from modelpress.config import CompressConfig, PlanConfig
from modelpress.errors import ConfigError
from modelpress.plan import fastest
from modelpress.plan.data import calibration, named
from modelpress.plan.kernels import offered, products
from modelpress.plan.sensitivity import least_measurements
from modelpress.plan.smallest import measured, opened, settle, survey
from modelpress.plan.survey import Survey
from modelpress.plan.tensors import planned_weights
from modelpress.progress import Progress, silent
from modelpress.reports import PlanOutline, PlanReport
from modelpress.workload import Workload

__all__ = ["Survey", "measured", "opened", "outline", "plan", "settle", "survey"]

CODED = CompressConfig()


def outline(checkpoint: Checkpoint, workload: Workload, config: PlanConfig) -> list[PlanOutline]:
    """What `plan` would look at, without its measurements. Bad input is found here.

    Raises:
        ConfigError: a pattern that matches nothing, or a group size that divides nothing.
        CoverageError: nothing to plan.
        StageError: weights that are NaN or infinite.
        WorkloadError: too few calibration samples.
        CorruptionError: no ONNX checkpoint.
    """
    model = named(checkpoint)
    calibration(workload)
    if config.objective == "seconds":
        kernels = [str(one) for one in offered(config)]
        return [
            PlanOutline(
                name=one.weight,
                nodes=list(one.nodes),
                shape=list(one.shape),
                candidates=kernels,
                least_measurements=0,
            )
            for one in products(model, config)
        ]
    return [
        PlanOutline(
            name=weight.name,
            nodes=list(weight.nodes),
            shape=list(weight.values.shape),
            candidates=[str(one) for one in weight.candidates],
            least_measurements=least_measurements(weight),
        )
        for weight in planned_weights(model, config)
    ]


def plan(
    checkpoint: Checkpoint,
    workload: Workload,
    config: PlanConfig,
    compression: CompressConfig | None = CODED,
    progress: Progress = silent,
) -> tuple[Checkpoint, PlanReport]:
    """Plan a float ONNX checkpoint; the checkpoint given is left as it is.

    Args:
        checkpoint: float ONNX graph.
        workload: its calibration split is what the plan is made on, its evaluation split what it is judged on.
        config: the budget and what may be chosen.
        compression: how the pack will be coded; None: every tensor raw.
        progress: told of each weight, each setting and each point of the front.

    Returns:
        The planned checkpoint, and what was chosen, foretold and measured.

    Raises:
        BudgetExceededError: no plan but the float graph is within `max_disagreement`.
        ConfigError: a `recovery`, which needs the module.
        CoverageError: for `seconds`, no kernel is faster than float.
        StageError: for `seconds`, the plan as a whole is measured to be no faster.
        And all that `outline` raises.
    """
    if config.needs_module:
        raise ConfigError(
            "planning a graph with plan.recovery",
            found="no torch module",
            expected="the module that the graph was exported from",
            fix="call modelpress.plan.recovery.plan_module with it, or leave plan.recovery out",
        )
    if config.objective == "seconds":
        return fastest.plan(checkpoint, workload, config, compression, progress)
    return settle(survey(checkpoint, workload, config, compression, progress), config.max_disagreement, progress)
