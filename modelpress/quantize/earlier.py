"""Whether a new version does as well on an earlier one's scales as on fresh ones."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import ModelProto

from modelpress import graph
from modelpress.agreement import Judge, from_cosine
from modelpress.config import QuantizeConfig
from modelpress.progress import Progress
from modelpress.quantize.build import builder
from modelpress.quantize.frozen import Frozen
from modelpress.quantize.observe import Inputs
from modelpress.quantize.selection import Layer
from modelpress.quantize.sensitivity import Build
from modelpress.reports import FrozenReport


def on_earlier_scales(
    model: ModelProto,
    layers: Sequence[Layer],
    batches: Sequence[Inputs],
    config: QuantizeConfig,
    fresh: Build,
    frozen: Frozen,
    progress: Progress,
) -> tuple[tuple[ModelProto, float] | None, FrozenReport]:
    """The model on the earlier scales with its disagreement, None where fresh ones are to be taken, and why.

    The earlier version also says which layers compute in float, so that every layer has the form that it had.

    Args:
        model: float.
        layers: chosen.
        batches: calibration data.
        config: the method, `max_quality_drop` and `max_scales_loss`.
        fresh: makes models on fresh scales.
        frozen: the earlier version.
        progress: told of what is prepared.

    Raises:
        ConfigError: the earlier version is no such model.
    """
    integers, in_float = frozen.forms(layers, config)
    progress(0, 1, "quantizing on the earlier version's scales")
    made = builder(model, layers, batches, config, progress, frozen)(integers, in_float)
    judge = Judge(graph.split(model), batches, from_cosine)
    disagreement = judge.disagreement(graph.split(made))
    anew = judge.disagreement(graph.split(fresh(integers, in_float)))
    within = disagreement <= config.max_quality_drop
    chosen = within and disagreement - anew <= config.max_scales_loss
    if not within:
        reason = f"beyond quantize.max_quality_drop, {config.max_quality_drop}"
    else:
        reason = (
            f"{disagreement - anew:+.6f} against fresh scales, of quantize.max_scales_loss {config.max_scales_loss}"
        )
    kept = sum(row.frozen for row in frozen.rows)
    report = FrozenReport(
        base=config.scales_from or "",
        chosen=chosen,
        reason=reason,
        agreement=1.0 - disagreement,
        fresh_agreement=1.0 - anew,
        frozen_weights=kept,
        fresh_weights=len(frozen.rows) - kept,
        weights=frozen.rows,
    )
    return ((made, disagreement) if chosen else None), report
