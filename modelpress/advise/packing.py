"""The bytes of a pack, by making one: shards, graph, the workload's files, golden samples and manifest, in a folder
that is gone afterwards.

What the line knows only at its end is stood in for: the scores of held samples for those of evaluation samples, and the
report of the coding for those of all stages.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from modelpress import golden, scores
from modelpress.checkpoint import Checkpoint
from modelpress.compress import compress
from modelpress.config import CompressConfig, OptimizeConfig
from modelpress.process import PROCESSING_FILE
from modelpress.reports import CompressReport
from modelpress.scores import Scored
from modelpress.shard import draft_manifest, write_shards
from modelpress.workload import Workload


@dataclass(frozen=True)
class Packed:
    """A pack that was made to be weighed."""

    published_bytes: int
    """Of all its blobs and of the manifest."""
    shards_bytes: int
    """Of its shards."""
    coding: CompressReport
    """What coding reached."""


def weigh(
    made: Checkpoint,
    workload: Workload,
    config: OptimizeConfig,
    compression: CompressConfig | None,
    judged: tuple[Scored, Scored] | None,
) -> Packed:
    """What a graph takes as a pack.

    Args:
        made: the ONNX checkpoint.
        workload: whose files go with it.
        config: of the whole recipe: it stands in the manifest, and says how shards are cut.
        compression: None stores every tensor raw.
        judged: scores of the graph and of the source.
    """
    coded, report = compress(made, compression)
    files = {**made.files, **workload.files(), **_golden(made, workload, config.upload.golden_samples)}
    if judged is not None:
        files[scores.SCORES_FILE] = scores.dump(dict(zip(("candidate", "source"), judged, strict=True)))
    if (spec := workload.processing()) is not None:
        files[PROCESSING_FILE] = spec.to_bytes()
    whole = replace(coded, files=files)
    with tempfile.TemporaryDirectory(prefix="modelpress-") as folder:
        shards, sharded = write_shards(whole, config.shard, Path(folder))
        manifest, _ = draft_manifest(
            config.name, whole, shards, config=config.model_dump(mode="json"), reports={"compress": report}
        )
    return Packed(manifest.published_bytes, sharded.total_bytes, report)


def _golden(made: Checkpoint, workload: Workload, samples: int) -> dict[str, bytes]:
    if not samples:
        return {}
    inputs = {name: tensor.numpy() for name, tensor in workload.example(samples).items()}
    found = golden.make(made, inputs, classes=workload.outputs == "logits")
    return {} if found is None else {golden.GOLDEN_FILE: found.to_bytes()}
