"""What changed from one pack to another: recipe, tensors, files, bytes, and quality with its interval."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from modelpress import intervals, load, scores
from modelpress.errors import EncryptionKeyError
from modelpress.manifest import Manifest, TensorEntry
from modelpress.reports.changes import ChangesReport, FieldChange, PackSide, QualityDifference, TensorDifference
from modelpress.scores import Scored, Scores
from modelpress.store.base import Store

CONFIDENCE = 0.95


def compare(
    store: Store, before: tuple[str, str], after: tuple[str, str], confidence: float = CONFIDENCE
) -> ChangesReport:
    """Compare two packs by their manifests and their per-sample scores; no weight is read.

    Args:
        store: the publication store.
        before: name and reference (an alias, a digest, or its beginning).
        after: the same; the names may differ.
        confidence: two-sided, of the intervals.

    Raises:
        NotFoundError: one of them is not there.
        TrustError, CorruptionError: see `load.load_manifest`.
    """
    one, two = (load.load_manifest(store, name, load.resolve(store, name, ref)) for name, ref in (before, after))
    tensors, equal = _tensors(one, two)
    found, unmeasured = _quality(store, one, two, confidence)
    blobs = two.blobs()
    return ChangesReport(
        before=_side(one),
        after=_side(two),
        config=_fields(one.config, two.config),
        about=_fields(_about(one), _about(two)),
        tensors=tensors,
        equal_tensors=equal,
        files=_fields({file.name: file.sha256 for file in one.files}, {file.name: file.sha256 for file in two.files}),
        shared_bytes=sum(size for digest, size in one.blobs().items() if digest in blobs),
        quality=found,
        unmeasured=unmeasured,
    )


def _side(manifest: Manifest) -> PackSide:
    return PackSide(
        name=manifest.name,
        pack=manifest.digest,
        raw_bytes=manifest.raw_bytes,
        published_bytes=manifest.published_bytes,
    )


def _about(manifest: Manifest) -> dict[str, Any]:
    """What of a manifest is neither recipe nor bytes."""
    kept = manifest.model_dump(mode="json", include={"kind", "licence", "versions", "lineage", "format_version"})
    encrypted = manifest.encryption.algorithm if manifest.encryption is not None else None
    return kept | {"base": manifest.base, "encryption": encrypted}


def _fields(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[FieldChange]:
    """The leaves that differ, in the order of their paths."""
    one, two = dict(_leaves(before)), dict(_leaves(after))
    paths = sorted({path for path in (*one, *two) if one.get(path) != two.get(path)})
    return [FieldChange(field=path, before=one.get(path), after=two.get(path)) for path in paths]


def _leaves(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted path and JSON of each value that is no object, lists whole."""
    for key, value in document.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False)


def _tensors(before: Manifest, after: Manifest) -> tuple[list[TensorDifference], int]:
    one, two = ({tensor.name: tensor for tensor in manifest.tensors} for manifest in (before, after))
    found, equal = [], 0
    for name in sorted({*one, *two}):
        what = _difference(one.get(name), two.get(name))
        if what is None:
            equal += 1
            continue
        found.append(
            TensorDifference.model_validate(
                {
                    "name": name,
                    "what": what,
                    "before": _form(one.get(name)),
                    "after": _form(two.get(name)),
                    "stored_before": one[name].stored_bytes if name in one else 0,
                    "stored_after": two[name].stored_bytes if name in two else 0,
                }
            )
        )
    return found, equal


def _difference(before: TensorEntry | None, after: TensorEntry | None) -> str | None:
    if before is None or after is None:
        return "added" if before is None else "removed"
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        return "form"
    if before.raw_sha256 != after.raw_sha256:
        return "values"
    coded = [(one.codec, one.stored_sha256, one.base) for one in (before, after)]
    return "coding" if coded[0] != coded[1] else None


def _form(tensor: TensorEntry | None) -> str | None:
    return f"{tensor.dtype} {'×'.join(map(str, tensor.shape)) or 'scalar'}" if tensor is not None else None


def _quality(
    store: Store, before: Manifest, after: Manifest, confidence: float
) -> tuple[list[QualityDifference], str | None]:
    """Each metric that both have; else why there is none."""
    found = []
    for manifest in (before, after):
        try:
            scored = scores.of_pack(manifest, load.fetcher(store, manifest)).get("candidate")
        except EncryptionKeyError as error:
            return [], f"{manifest.name}@{manifest.digest[:12]} can't be opened: {error.found or error.doing}"
        if scored is None or scored.scores is None:
            return [], f"{manifest.name}@{manifest.digest[:12]} was published without scores"
        found.append(scored)
    one, two = (_metrics(scored) for scored in found)
    both = [name for name in two if name in one]
    if not both:
        return [], f"one was scored by {', '.join(one)}, the other by {', '.join(two)}"
    for manifest, metrics in ((before, one), (after, two)):
        broken = [name for name in both if metrics[name].size == 0 or not np.isfinite(metrics[name]).all()]
        if broken:
            return [], f"{', '.join(broken)} of {manifest.name}@{manifest.digest[:12]} is no vector of finite scores"
    paired = found[0].samples == found[1].samples and one[both[0]].size == two[both[0]].size
    return [_measured(name, one[name], two[name], paired, confidence) for name in both], None


def _metrics(scored: Scored) -> dict[str, Scores]:
    """All metrics by name, the primary one first."""
    assert scored.scores is not None
    return {scored.metric: scored.scores, **scored.further}


def _measured(metric: str, before: Scores, after: Scores, paired: bool, confidence: float) -> QualityDifference:
    interval = (intervals.paired_difference if paired else intervals.difference)(after, before, confidence)
    return QualityDifference(
        metric=metric,
        before=float(before.mean()),
        after=float(after.mean()),
        difference=interval.value,
        low=interval.low,
        high=interval.high,
        confidence=confidence,
        samples=after.size,
        paired=paired,
    )
