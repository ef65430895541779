"""The stages that make and change the model, in the order of the line: what a whole run and a part of one share."""

from __future__ import annotations

from collections.abc import Iterator

from flows.line import Line
from modelpress.config import OptimizeConfig, Part
from modelpress.errors import ConfigError
from modelpress.reports import ArtifactRef
from tasks.models import distill, export, plan, prune, quantize, source
from tasks.profiling import profile


def check_part(config: OptimizeConfig, part: Part) -> None:
    """Refuse a stage that a recipe leaves out.

    Raises:
        ConfigError: it does.
    """
    if part not in config.parts:
        raise ConfigError(
            f"looking for stage {part!r} in recipe {config.name!r}",
            found=f"stages {', '.join(config.parts)}",
            fix="name one of them, or switch the stage on in the recipe",
        )


def run_stages(line: Line, config: OptimizeConfig) -> Iterator[tuple[Part, ArtifactRef]]:
    """Run them one by one, each as it is asked for: its name and its output, which is measured and within the budget.

    Raises:
        BudgetExceededError: of a stage whose output is not.
    """
    run = line.context
    model = line.judged("source", source(run))
    exported = line.judged("source (onnx)", export(run, model, config.export, label="export-source"), of="source")
    if config.profile:
        line.profiled(profile(run, model, exported, config.profile, config.compress))
    yield "source", model
    if config.distill:
        model = line.judged("distill", distill(run, model, config.distill))
        yield "distill", model
    if config.prune:
        model = line.judged("prune", prune(run, model, config.prune))
        yield "prune", model
    graph = line.judged("export", export(run, model, config.export))
    yield "export", graph
    if config.quantize:
        yield "quantize", line.judged("quantize", quantize(run, graph, config.quantize, model, config.export))
    if config.plan:
        planned = plan(run, graph, config.plan, config.compress, model, config.export)
        yield "plan", line.judged("plan", planned)
