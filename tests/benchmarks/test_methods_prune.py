"""The pruning benchmark trains on each text once, in batches of like length."""

from __future__ import annotations

from pathlib import Path

from benchmarks.methods.prune import Texts
from modelpress.config import WorkloadConfig
from modelpress.workload import Batch
from tests.encoders import make_encoder_folder


def test_each_training_text_once_in_an_order_by_the_seed(tmp_path: Path) -> None:
    folder = make_encoder_folder(tmp_path, 60)
    workload = Texts(WorkloadConfig(kind="sentence-embedding", model=str(folder), data=str(folder / "pairs.jsonl")))

    def rows(batch: Batch) -> list[tuple[int, ...]]:
        return [tuple(row[row > 0].tolist()) for row in batch.inputs["input_ids"]]

    plain = [row for batch in workload.batches("train", 8) for row in rows(batch)]
    epochs = [[rows(batch) for batch in workload.batches("train", 8, seed)] for seed in (0, 1, 0)]
    assert epochs[0] == epochs[2] != epochs[1]
    for epoch in epochs:
        assert sorted(row for batch in epoch for row in batch) == sorted(plain)
    spread = [max(map(len, batch)) - min(map(len, batch)) for batch in epochs[0]]
    assert sum(spread) / len(spread) < 2
