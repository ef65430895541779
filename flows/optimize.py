"""The whole line as one flow: from a trained model to a published, registered and judged one."""

from __future__ import annotations

from prefect import flow

from flows.approval import approved
from flows.line import tracked
from flows.result import OptimizeResult
from flows.stages import run_stages
from modelpress.config import OptimizeConfig
from tasks.packs import compress, pin_bases, shard, upload
from tasks.release import promote, register
from tasks.restarts import check_wanted, on_crashed

__all__ = ["OptimizeResult", "optimize"]


@flow(name="optimize", flow_run_name="optimize-{config.name}", on_crashed=[on_crashed])
def optimize(config: OptimizeConfig) -> OptimizeResult:
    """Make a trained model smaller and faster, publish it, and promote it if it is no worse.

    Each stage takes its finished output from the work store where there is one, so that a run which was interrupted,
    or is started twice, repeats nothing. A stage whose quality is over budget ends the flow; nothing is published then.
    Where the gate asks for approval, the run waits for a person's answer at its end.
    """
    config = pin_bases(config)
    with tracked(config) as line:
        run = line.context
        *_, (_, graph) = run_stages(line, config)
        coded = line.passed("compress", compress(run, graph, config.compress))
        shards = line.passed("shard", shard(run, coded.output, config.shard))
        check_wanted()
        published = line.passed("upload", upload(run, coded.output, shards.outputs, config, line.provenance()))
        version = register(run, published.report, line.lineage(), line.headline(), line.of_hardware())
        decision = promote(config.name, published.report.pack, config.gate) if config.promote else None
        line.delivered(published.report, version, decision)
    result = line.result
    if decision is None:
        return result
    # A person may take a day: the run in MLflow has ended by then, and says that it waits.
    return result.model_copy(update={"decision": approved(config.name, result.pack, config.gate, decision)})
