"""What weights cost in a pack: by the real codecs, on the very codes that would be published."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import zstandard

from modelpress.checkpoint import Checkpoint
from modelpress.compress import compress
from modelpress.config import CompressConfig
from modelpress.graph import GRAPH_FILE, INLINE_BELOW
from modelpress.pack_files import FILE_LEVEL
from modelpress.plan.candidates import Coding
from modelpress.plan.rewrite import CODES, SCALE
from modelpress.plan.tensors import PlannedWeight


class Cost(NamedTuple):
    """Bytes of a weight."""

    coded: int
    """Of its tensors, losslessly coded."""
    inline: int
    """Of those that are so small that they stay in the graph's file, as they are."""

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.coded + self.inline


def float_cost(weight: PlannedWeight, config: CompressConfig | None) -> Cost:
    """Bytes of a weight that stays in float."""
    return _cost({weight.name: weight.values}, config)


def coding_cost(weight: PlannedWeight, coding: Coding, config: CompressConfig | None) -> Cost:
    """Bytes of a weight's codes and scales."""
    return _cost({weight.name + CODES: coding.codes, weight.name + SCALE: coding.scale}, config)


def coded_bytes(checkpoint: Checkpoint, config: CompressConfig | None) -> int:
    """What `compress` makes of all tensors."""
    return compress(checkpoint, config)[1].stored_bytes


def file_bytes(checkpoint: Checkpoint) -> int:
    """The graph's file, as a pack stores it."""
    return len(zstandard.ZstdCompressor(level=FILE_LEVEL).compress(checkpoint.files[GRAPH_FILE]))


def _cost(arrays: dict[str, np.ndarray], config: CompressConfig | None) -> Cost:
    inline = sum(array.nbytes for array in arrays.values() if array.nbytes < INLINE_BELOW)
    tensors = {
        name: torch.from_numpy(np.array(array)) for name, array in arrays.items() if array.nbytes >= INLINE_BELOW
    }
    return Cost(coded_bytes(Checkpoint("onnx", tensors), config) if tensors else 0, inline)
