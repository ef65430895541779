"""What is held at a time, on the way there and on the way back, counted by the arrays that are alive."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from modelpress import load
from modelpress.config import CompressConfig, ShardConfig
from modelpress.container import read_tensors
from modelpress.folder.staging import stage
from modelpress.progress import silent
from modelpress.store.local import LocalStore
from tests.packs import make_pack, torch_checkpoint

BYTES, COUNT = 4096, 60


class Alive:
    """Arrays that were given out and not let go."""

    def __init__(self) -> None:
        self._given: list[weakref.ref[np.ndarray]] = []
        self.most_bytes = 0

    def give(self, array: np.ndarray) -> torch.Tensor:
        """A tensor over the array, which lives as long as anything looks at its memory."""
        self._given.append(weakref.ref(array))
        self.most_bytes = max(self.most_bytes, sum(one.nbytes for ref in self._given if (one := ref()) is not None))
        return torch.from_numpy(array)


@pytest.mark.parametrize("config", [None, CompressConfig()], ids=["raw", "coded"])
def test_a_tensor_and_two_shards_are_held_while_a_folder_is_coded(
    tmp_path: Path, config: CompressConfig | None
) -> None:
    alive, random = Alive(), np.random.default_rng(0)

    def read(name: str) -> torch.Tensor:
        return alive.give(random.standard_normal(BYTES // 4).astype(np.float32))

    shard = ShardConfig(max_shard_size=3 * BYTES)
    staged = stage([f"t{number}" for number in range(COUNT)], read, tmp_path, config, shard, silent)
    assert sum(entry.raw_bytes for entry in staged.entries) == BYTES * COUNT
    assert BYTES <= alive.most_bytes <= BYTES + 2 * shard.max_shard_size < BYTES * COUNT / 8


def test_one_tensor_is_held_while_a_pack_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, pack, alive = LocalStore(tmp_path / "store"), make_pack(tmp_path / "shards"), Alive()
    pack.publish(store)

    def watched(parts: load.Parts) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in read_tensors(parts.manifest, parts.fetch):
            if tensor.numel() < 2:
                yield name, tensor
                continue
            words = tensor.reshape(-1).view(torch.uint8).numpy().copy()
            yield name, alive.give(words).view(tensor.dtype).reshape(tensor.shape)
            del words

    monkeypatch.setattr("modelpress.load.Parts.tensors", watched)
    load.pull(store, "demo", pack.digest, tmp_path / "pulled", "checkpoint")
    assert alive.most_bytes == max(tensor.nbytes for tensor in torch_checkpoint().tensors.values())
