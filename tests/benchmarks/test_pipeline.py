"""The pipeline benchmark reads the gate's bounds and the parameters from what a run leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.pipeline import _bounds, _parameters
from modelpress.config import GateConfig
from registry.gates import Check, Evidence, Scored, decide


def test_bounds_are_the_gates() -> None:
    reference = np.tile([1.0, 0.0], 200)
    candidate = np.concatenate([np.ones(10), reference[10:]])
    evidence = Evidence(
        candidate=Scored(candidate, "samples", "accuracy"),
        source=Scored(reference, "samples", "accuracy"),
        champion=None,
        compression_ratio=4.0,
        speedup=2.0,
        attribution=None,
        coverage=1.0,
        quantized=True,
    )
    check = next(one for one in decide(evidence, GateConfig()).checks if one.name == "quality against the source")
    low, high = _bounds(check)
    assert low is not None
    assert high is not None
    assert low < (candidate - reference).mean() < high


def test_what_was_not_measured_has_no_bounds() -> None:
    assert _bounds(None) == (None, None)
    check = Check(name="quality against the source", verdict="fail", reason="accuracy was not measured")
    assert _bounds(check) == (None, None)


def test_parameters_come_from_the_source_record(tmp_path: Path) -> None:
    record = tmp_path / "work" / "stages" / "source" / "key.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"report": {"parameters": 7}}))
    assert _parameters(tmp_path) == 7
    (record.parent / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="too many"):
        _parameters(tmp_path)
