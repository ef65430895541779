"""Per-sample scores as a small safetensors file: what lets a later candidate be paired with today's champion."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import safetensors
import safetensors.numpy

from modelpress.errors import CorruptionError
from modelpress.manifest import Manifest
from modelpress.pack_files import unpack_file
from modelpress.store.base import Store
from registry.gates import Scored, Scores

SCORES_FILE = "scores.safetensors"
"""Name of the file in a pack; it holds `candidate` and `source`."""


def dump(scores: Mapping[str, Scores], *, samples: str, metric: str) -> bytes:
    """Serialise named vectors of scores; `samples` is the digest of what they were measured on."""
    vectors = {name: np.ascontiguousarray(vector, dtype=np.float64) for name, vector in scores.items()}
    # One entry: safetensors writes several in any order, and the same scores must always be the same bytes.
    measured = json.dumps({"metric": metric, "samples": samples}, sort_keys=True)
    return bytes(safetensors.numpy.save(vectors, {"measured": measured}))


def dump_scored(scored: Mapping[str, Scored]) -> bytes:
    """Serialise vectors that were measured on the same samples.

    Raises:
        ValueError: they were not, or one was not measured.
    """
    vectors = {name: one.scores for name, one in scored.items() if one.scores is not None}
    measured = {(one.samples, one.metric) for one in scored.values()}
    if len(vectors) != len(scored) or len(measured) != 1:
        raise ValueError(f"scores of {len(vectors)} of {len(scored)} models on {len(measured)} sets of samples")
    samples, metric = measured.pop()
    return dump(vectors, samples=samples, metric=metric)


def load(data: bytes) -> dict[str, Scored]:
    """Read what `dump` wrote.

    Raises:
        CorruptionError: not such a file.
    """
    try:
        vectors = safetensors.numpy.load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = _metadata(data[8 : 8 + length])
        return {
            name: Scored(vector.astype(np.float64), metadata["samples"], metadata["metric"])
            for name, vector in vectors.items()
        }
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise CorruptionError("reading per-sample scores", found=str(error), expected="a scores file") from error


def _metadata(header: bytes) -> dict[str, str]:
    found: dict[str, str] = json.loads(json.loads(header)["__metadata__"]["measured"])
    if not all(isinstance(found[key], str) for key in ("metric", "samples")):
        raise ValueError("metric and samples are no text")
    return found


def of_pack(store: Store, manifest: Manifest) -> dict[str, Scored]:
    """The scores in a pack, `candidate` and `source`; empty where it was published without.

    Raises:
        CorruptionError: they are not what the manifest says, or no scores.
    """
    from modelpress import load as packs  # pulls in torch

    entry = next((entry for entry in manifest.files if entry.name == SCORES_FILE), None)
    return load(unpack_file(entry, packs.fetcher(store, manifest)(entry.stored_sha256))) if entry else {}
