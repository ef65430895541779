"""Stage records: what makes a run that is started again recompute nothing that was finished.

A record is `stages/<stage>/<key>.json` in the work store. Its key is the sha256 of everything that decides the output:
the stage, the digests of its inputs, the config, the workload's identity, the library's version and those of the
libraries that make the bytes; of what is measured, the machine as well (`tasks/evaluation.py`). It is written after the
output, and created only if absent: of two runs that raced, both go on with the first one's.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from modelpress import __version__, keys
from modelpress.errors import CorruptionError
from modelpress.reports import ArtifactRef, Report
from modelpress.store.base import Store

ReportT = TypeVar("ReportT", bound=Report)
LIBRARIES = (
    *("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu"),
    *("transformers", "timm", "torchvision", "tokenizers", "zstandard", "captum"),
)
"""Other versions of these make other bytes of the same model, or other measurements."""


class Record(Report):
    """A finished stage, as stored."""

    stage: str
    """The stage."""
    key: str
    """What decided its output; see `stage_key`."""
    outputs: dict[str, ArtifactRef]
    """By name; most stages have one, `output`."""
    report: dict[str, Any]
    """The stage's report as JSON."""
    seconds: float
    """Time that the stage took when it ran."""


@dataclass(frozen=True)
class Finished(Generic[ReportT]):
    """What a task hands back: references and the report, never the bytes."""

    stage: str
    outputs: dict[str, ArtifactRef]
    report: ReportT
    seconds: float
    """Time that the stage took when it ran."""
    reused: bool
    """Whether a finished output was taken instead of running."""

    @property
    def output(self) -> ArtifactRef:
        """The output of a stage that has one."""
        return self.outputs["output"]


def stage_key(
    stage: str, *, inputs: Sequence[ArtifactRef], config: str, identity: str, extra: Mapping[str, Any] | None = None
) -> str:
    """Key of a stage's output: sha256 (hex). The versions of `LIBRARIES` count as well.

    Args:
        stage: the stage.
        inputs: what it reads; their digests count, their places do not.
        config: fingerprint of its config.
        identity: `Workload.identity()`.
        extra: whatever else decides the output, as JSON values.
    """
    parts = [
        stage,
        [ref.sha256 for ref in inputs],
        config,
        identity,
        dict(extra or {}),
        __version__,
        library_versions(),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@functools.cache
def library_versions() -> dict[str, str | None]:
    """Versions of the installed `LIBRARIES`; None for one that is not."""
    found: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def find_record(store: Store, stage: str, key: str) -> Record | None:
    """The record of a finished stage whose outputs are all there.

    Raises:
        CorruptionError: the record is not one.
    """
    place = _place(stage, key)
    if store.info(place) is None:
        return None
    try:
        record = Record.model_validate_json(store.get(place))
    except ValidationError as error:
        raise _damaged(store, place, error) from error
    # Outputs are found by content: a work store that was moved or copied keeps its worth.
    outputs = {name: _here(store, ref) for name, ref in record.outputs.items()}
    present = all(_present(store, ref) for ref in outputs.values())
    return record.model_copy(update={"outputs": outputs}) if present else None


def save_record(store: Store, record: Record, *, replace: bool) -> Record:
    """Store a record and return the one that counts: with `replace` false, an earlier one wins."""
    data = record.model_dump_json(indent=1).encode()
    place = _place(record.stage, record.key)
    if replace:
        store.put(place, data)
        return record
    if store.put(place, data, if_absent=True):
        return record
    earlier = find_record(store, record.stage, record.key)
    if earlier is not None:
        return earlier
    store.put(place, data)  # the earlier one's outputs are gone
    return record


def read_report(store: Store, record: Record, report_type: type[ReportT]) -> ReportT:
    """The report in a record.

    Raises:
        CorruptionError: it is not of this type.
    """
    try:
        return report_type.model_validate(record.report)
    except ValidationError as error:
        raise _damaged(store, _place(record.stage, record.key), error) from error


def _damaged(store: Store, place: str, error: ValidationError) -> CorruptionError:
    return CorruptionError(
        f"reading the stage record {store.uri}/{place}",
        found=str(error),
        expected="a record written by this version",
        fix="delete it, and the stage runs again",
    )


def _place(stage: str, key: str) -> str:
    return f"stages/{stage}/{key}.json"


def _here(store: Store, ref: ArtifactRef) -> ArtifactRef:
    return ref.model_copy(update={"uri": f"{store.uri}/{keys.blob(ref.sha256)}"})


def _present(store: Store, ref: ArtifactRef) -> bool:
    info = store.info(keys.blob(ref.sha256))
    return info is not None and info.size_bytes == ref.size_bytes
