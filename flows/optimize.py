"""The whole line as one flow: from a trained model to a published, registered and judged one."""

from __future__ import annotations

from prefect import flow

from flows.line import tracked
from flows.result import OptimizeResult
from modelpress.config import OptimizeConfig
from tasks.models import distill, export, plan, prune, quantize, source
from tasks.packs import compress, pin_bases, shard, upload
from tasks.release import promote, register
from tasks.restarts import check_wanted, on_crashed

__all__ = ["OptimizeResult", "optimize"]


@flow(name="optimize", flow_run_name="optimize-{config.name}", on_crashed=[on_crashed])
def optimize(config: OptimizeConfig) -> OptimizeResult:
    """Make a trained model smaller and faster, publish it, and promote it if it is no worse.

    Each stage takes its finished output from the work store where there is one, so that a run which was interrupted,
    or is started twice, repeats nothing. A stage whose quality is over budget ends the flow; nothing is published then.
    """
    config = pin_bases(config)
    with tracked(config) as line:
        run = line.context
        model = line.judged("source", source(run))
        line.judged("source (onnx)", export(run, model, config.export, label="export-source"), of="source")
        if config.distill:
            model = line.judged("distill", distill(run, model, config.distill))
        if config.prune:
            model = line.judged("prune", prune(run, model, config.prune))
        graph = line.judged("export", export(run, model, config.export))
        if config.quantize:
            graph = line.judged("quantize", quantize(run, graph, config.quantize, model, config.export))
        if config.plan:
            graph = line.judged("plan", plan(run, graph, config.plan, config.compress, model, config.export))
        coded = line.passed("compress", compress(run, graph, config.compress))
        shards = line.passed("shard", shard(run, coded.output, config.shard))
        check_wanted()
        published = line.passed("upload", upload(run, coded.output, shards.outputs, config, line.provenance()))
        version = register(run, published.report, line.lineage(), line.headline())
        decision = promote(config.name, published.report.pack, config.gate) if config.promote else None
        return line.delivered(published.report, version, decision)
