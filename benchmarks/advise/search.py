"""The peer of an advice: every recipe of the grid run, published, evaluated and timed."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel
from torch import nn

from modelpress import golden, graph, scores
from modelpress.advise.grid import Candidate
from modelpress.checkpoint import Checkpoint
from modelpress.compress import compress
from modelpress.config import AdviseRecipe, EvaluateConfig, OptimizeConfig, ShardConfig, UploadConfig
from modelpress.distill import distill
from modelpress.errors import ModelpressError
from modelpress.evaluate import evaluate
from modelpress.export import export
from modelpress.load import load_checkpoint
from modelpress.plan import plan
from modelpress.plan.latency import times_in_turns
from modelpress.process import PROCESSING_FILE
from modelpress.prune import prune_
from modelpress.publish import publish
from modelpress.quantize import quantize
from modelpress.quantize.from_module import quantize_module
from modelpress.scores import SCORES_FILE, Scored
from modelpress.shard import draft_manifest, write_shards
from modelpress.store import open_store
from modelpress.workload import Workload

TURN_SECONDS = 1.0
"""Spent on each graph at each batch size, in turns."""
JUDGED = EvaluateConfig(batch_sizes=[1], latency_seconds=0.001)
Say = Callable[[str], None]


class Ran(BaseModel):
    """What one recipe was measured to be like."""

    label: str
    failed: str = ""
    """Why it made no model."""
    published_bytes: float = 0.0
    """Shards, files and manifest of the pack."""
    quality_drop: float = 0.0
    """On the evaluation split."""
    load_seconds: float = 0.0
    """Reading the pack from this disk, every digest and tensor checked, to a session."""
    latency_seconds: float = 0.0
    """Fastest call with one sample."""
    batch_seconds: float = 0.0
    """Fastest call with the larger batch."""
    median_latency_seconds: float = 0.0
    median_batch_seconds: float = 0.0
    seconds: float = 0.0
    """Time that it took to make and to judge."""


def search(
    recipe: AdviseRecipe, workload: Workload, source: nn.Module, grid: Sequence[Candidate], say: Say
) -> tuple[Ran, list[Ran]]:
    """The float model, and each recipe of the grid; all are timed in turns, once they are made."""
    exported = export(source, workload, recipe.export)[0]
    _, baseline = evaluate(exported, workload, JUDGED, "export", None, 1)
    rows, made = [], [exported]
    with tempfile.TemporaryDirectory(prefix="modelpress-") as folder:
        now = _published(Ran(label="float"), exported, workload, [baseline, baseline], None, Path(folder) / "now")
        for number, candidate in enumerate(grid):
            say(f"{recipe.name}: {number + 1} of {len(grid)}: {candidate.label}")
            started = time.perf_counter()
            config = candidate.config(recipe)
            try:
                checkpoint = _make(config, workload, source, exported)
            except ModelpressError as error:
                why = "; ".join(filter(None, (error.doing, error.found)))
                rows.append(Ran(label=candidate.label, failed=why, seconds=time.perf_counter() - started))
                continue
            report, scored = evaluate(checkpoint, workload, JUDGED, "quantize", baseline, 1)
            row = Ran(label=candidate.label, quality_drop=-(report.quality.difference or 0.0))
            row = _published(row, checkpoint, workload, [scored, baseline], config, Path(folder) / str(number))
            rows.append(row.model_copy(update={"seconds": time.perf_counter() - started}))
            made.append(checkpoint)
    say(f"{recipe.name}: timing {len(made)} graphs")
    return _timed(recipe, workload, now, rows, made)


def _make(config: OptimizeConfig, workload: Workload, source: nn.Module, exported: Checkpoint) -> Checkpoint:
    """The stages of a recipe, as the line runs them."""
    module, checkpoint = source, exported
    if config.distill:
        module, _ = distill(module, workload, config.distill)
    if config.prune:
        module = copy.deepcopy(module)
        prune_(module, workload, config.prune)
    if config.distill or config.prune:
        checkpoint = export(module, workload, config.export)[0]
    if config.quantize and config.quantize.needs_module:
        return quantize_module(module, checkpoint, workload, config.quantize, config.export)[0]
    if config.quantize:
        return quantize(checkpoint, workload, config.quantize)[0]
    return plan(checkpoint, workload, config.plan, config.compress)[0] if config.plan else checkpoint


def _further_files(checkpoint: Checkpoint, workload: Workload, scored: Sequence[Scored]) -> dict[str, bytes]:
    """What the line publishes beside the graph: scores, golden samples, processing."""
    files = {SCORES_FILE: scores.dump(dict(zip(("candidate", "source"), scored, strict=True)))}
    inputs = {name: tensor.numpy() for name, tensor in workload.example(UploadConfig().golden_samples).items()}
    found = golden.make(checkpoint, inputs, classes=workload.outputs == "logits")
    files |= {golden.GOLDEN_FILE: found.to_bytes()} if found else {}
    spec = workload.processing()
    return files | ({PROCESSING_FILE: spec.to_bytes()} if spec else {})


def _published(
    row: Ran,
    checkpoint: Checkpoint,
    workload: Workload,
    scored: Sequence[Scored],
    config: OptimizeConfig | None,
    folder: Path,
) -> Ran:
    """Publish to a folder, and load from there."""
    files = {**checkpoint.files, **workload.files(), **_further_files(checkpoint, workload, scored)}
    whole = Checkpoint("onnx", checkpoint.tensors, files, checkpoint.metadata)
    coded, coding = compress(whole, config.compress if config else None)
    folder.mkdir()
    shards, _ = write_shards(coded, ShardConfig(), folder)
    document = config.model_dump(mode="json") if config else {}
    manifest, blobs = draft_manifest("case", coded, shards, config=document, reports={"compress": coding})
    store = open_store(str(folder / "store"))
    report = publish(store, manifest, shards, blobs, source_bytes=1)
    started = time.perf_counter()
    _, loaded = load_checkpoint(store, "case", report.pack)
    graph.session(loaded)
    seconds = time.perf_counter() - started
    return row.model_copy(update={"published_bytes": float(report.published_bytes), "load_seconds": seconds})


def _timed(
    recipe: AdviseRecipe, workload: Workload, now: Ran, rows: list[Ran], made: list[Checkpoint]
) -> tuple[Ran, list[Ran]]:
    """Times of all graphs, in turns; `made` is the float one, and what the rows that did not fail stand for."""
    places = [place for place, row in enumerate(rows) if not row.failed]
    for batch, name in ((1, "latency_seconds"), (recipe.advise.batch_size, "batch_seconds")):
        first, *others = times_in_turns(made, workload.example(batch), TURN_SECONDS * len(made))
        now = now.model_copy(update=_told(name, first))
        for place, times in zip(places, others, strict=True):
            rows[place] = rows[place].model_copy(update=_told(name, times))
    return now, rows


def _told(name: str, times: Sequence[float]) -> dict[str, float]:
    return {name: min(times), f"median_{name}": statistics.median(times)}
