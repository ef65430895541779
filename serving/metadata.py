"""What clients are told of a model: what it takes and gives, which pack answers, and where that comes from."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from serving.engine import Engine
from serving.models import Loaded, ServedModel
from serving.processed import SUFFIX, Processed, ProcessedEngine, ProcessedModel

PLATFORM = "onnxruntime_onnx"


def described(model: ServedModel | ProcessedModel, loaded: Loaded | Processed) -> dict[str, Any]:
    """What the protocol's own fields say, over HTTP as over gRPC."""
    engine = loaded.engine
    return {
        "name": model.name,
        "versions": model.versions(),
        "platform": PLATFORM,
        "inputs": [spec.to_json() for spec in engine.inputs],
        "outputs": [spec.to_json() for spec in engine.outputs],
    }


def metadata(model: ServedModel | ProcessedModel, loaded: Loaded | Processed) -> dict[str, Any]:
    """The same with what is ours in `parameters`: the pack, its pointer, the gate's word, what it was tested on."""
    engine, entry, failure = loaded.engine, loaded.pointer, model.failure
    identity: dict[str, Any] = {"pack": engine.pack}
    if entry is None:
        identity["held"] = True
    else:
        since = {"alias": entry.alias, "pointer": entry.number, "since": entry.created.isoformat()}
        identity |= since | ({"decision": _verdict(entry.decision)} if entry.decision else {})
    identity |= {"provider": engine.provider, "batching": engine.rows.to_json(), "lineage": engine.lineage}
    identity |= _tested(engine) | store_state(model.lost)
    identity |= {"processed": f"{model.name}{SUFFIX}"} if engine.front else {}
    return described(model, loaded) | {"parameters": identity | ({"failure": failure.reason} if failure else {})}


def store_state(lost: datetime | None) -> dict[str, Any]:
    """That the store does not answer, where it does not: what answers then may be older than what was promoted."""
    return {} if lost is None else {"store": f"unreachable since {lost.isoformat(timespec='seconds')}"}


def _tested(engine: Engine | ProcessedEngine) -> dict[str, Any]:
    """How the pack answered its golden samples."""
    tested = engine.tested
    if tested is None:
        return {"golden": False}
    return {"golden": True, "golden_difference": tested.difference, "golden_tolerance": tested.tolerance}


def _verdict(decision: Mapping[str, Any]) -> dict[str, Any]:
    """Of a decision of the gate, what everybody may read: that a person overrode it, and not who."""
    told = {key: decision[key] for key in ("promote", "verdict", "reasons", "record") if key in decision}
    return told | ({"overridden": True} if decision.get("override") else {})
