"""Per-sample scores: what lets a later candidate be paired with today's champion, and how they lie in a pack.

A scores file is a small safetensors file. Each model has its primary scores under its name (`candidate`, `source`) and
those of further metrics under `NAME/METRIC`, float64; the groups of samples that the workload names lie under
`slices/GROUP`, U8 of 0 and 1. All vectors have one length. The metadata say the metric and on which samples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from modelpress.errors import CorruptionError
from modelpress.manifest import Manifest
from modelpress.pack_files import unpack_file

SCORES_FILE = "scores.safetensors"
"""Name of the file in a pack; it holds `candidate` and `source`."""
SLICES = "slices"
"""No model's name: groups of samples lie under it."""

Scores = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Scored:
    """Per-sample scores of one model on one set of samples; higher is better."""

    scores: Scores | None
    """(samples,), float64; None: never measured."""
    samples: str
    """Digest of the samples in their order: scores pair only where it is the same."""
    metric: str
    """Name of the score."""
    further: Mapping[str, Scores] = field(default_factory=dict)
    """Scores of further metrics on the same samples, by name: (samples,), float64."""
    slices: Mapping[str, Mask] = field(default_factory=dict)
    """Groups of the samples, by name: (samples,), bool. A sample may be in several or in none."""


UNMEASURED = Scored(None, samples="", metric="quality")


def dump(scored: Mapping[str, Scored]) -> bytes:
    """Serialise the scores of models that were measured on the same samples, by the models' names.

    The same scores are always the same bytes. The groups are those of all models together.

    Raises:
        ValueError: they were measured on other samples, one was not measured, or a name is not a model's.
    """
    measured = {(one.samples, one.metric) for one in scored.values()}
    vectors: dict[str, np.ndarray] = {}
    for name, one in scored.items():
        if one.scores is None or len(measured) != 1:
            there = sum(other.scores is not None for other in scored.values())
            raise ValueError(f"scores of {there} of {len(scored)} models on {len(measured)} sets of samples")
        if name == SLICES or "/" in name:
            raise ValueError(f"{name!r} is no name of a model")
        vectors[name] = np.ascontiguousarray(one.scores, dtype=np.float64)
        for metric, found in one.further.items():
            vectors[f"{name}/{metric}"] = np.ascontiguousarray(found, dtype=np.float64)
        for group, mask in one.slices.items():
            vectors[f"{SLICES}/{group}"] = np.ascontiguousarray(mask, dtype=np.uint8)
    samples, metric = measured.pop()
    # One entry: safetensors writes several in any order, and the same scores must always be the same bytes.
    about = json.dumps({"metric": metric, "samples": samples}, sort_keys=True)
    return bytes(safetensors.numpy.save(vectors, {"measured": about}))


def load(data: bytes) -> dict[str, Scored]:
    """Read what `dump` wrote.

    Raises:
        CorruptionError: not such a file.
    """
    try:
        vectors = safetensors.numpy.load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = _metadata(data[8 : 8 + length])
        if len({vector.shape for vector in vectors.values()}) > 1 or any(one.ndim != 1 for one in vectors.values()):
            raise ValueError("not vectors of one length")
        slices = {key.partition("/")[2]: _mask(one) for key, one in vectors.items() if key.startswith(f"{SLICES}/")}
        return {
            name: Scored(
                vector.astype(np.float64),
                metadata["samples"],
                metadata["metric"],
                {
                    key.partition("/")[2]: one.astype(np.float64)
                    for key, one in vectors.items()
                    if key.startswith(f"{name}/")
                },
                slices,
            )
            for name, vector in vectors.items()
            if "/" not in name
        }
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise CorruptionError("reading per-sample scores", found=str(error), expected="a scores file") from error


def of_pack(manifest: Manifest, fetch: Callable[[str], bytes]) -> dict[str, Scored]:
    """The scores in a pack, `candidate` and `source`; empty where it was published without.

    Args:
        manifest: of the pack.
        fetch: gives the blob of a sha256, opened where the pack is encrypted (`load.fetcher`).

    Raises:
        CorruptionError: they are not what the manifest says, or no scores.
    """
    entry = next((entry for entry in manifest.files if entry.name == SCORES_FILE), None)
    return load(unpack_file(entry, fetch(entry.stored_sha256))) if entry else {}


def _metadata(header: bytes) -> dict[str, str]:
    found: dict[str, str] = json.loads(json.loads(header)["__metadata__"]["measured"])
    if not all(isinstance(found[key], str) for key in ("metric", "samples")):
        raise ValueError("metric and samples are no text")
    return found


def _mask(vector: np.ndarray) -> Mask:
    if vector.dtype != np.uint8 or not np.isin(vector, (0, 1)).all():
        raise ValueError("a group of samples that is not zeros and ones")
    return vector.astype(np.bool_)
