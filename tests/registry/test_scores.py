"""Per-sample scores as a file: exact, the same bytes every time, and refused where they are not that."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpress.errors import CorruptionError
from registry import scores
from registry.gates import Scored

VECTORS = st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=50)


@given(VECTORS, st.text(max_size=20), st.text(max_size=20))
def test_a_round_trip_is_exact(values: list[float], samples: str, metric: str) -> None:
    vector = np.array(values)
    found = scores.load(scores.dump({"scores": vector}, samples=samples, metric=metric))["scores"]
    assert found.scores is not None
    assert found.scores.tobytes() == vector.tobytes()
    assert (found.samples, found.metric) == (samples, metric)


def test_the_same_scores_are_the_same_bytes_in_every_process() -> None:
    code = (
        "import sys, numpy, registry.scores as s;"
        "vectors = {'source': numpy.ones(3), 'candidate': numpy.zeros(3)};"
        "sys.stdout.buffer.write(s.dump(vectors, samples='x', metric='y'))"
    )
    written = {subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout for _ in range(4)}
    assert len(written) == 1


def test_scores_of_other_samples_are_not_packed_together() -> None:
    one, other = Scored(np.ones(3), "these", "accuracy"), Scored(np.ones(3), "those", "accuracy")
    with pytest.raises(ValueError, match="2 sets of samples"):
        scores.dump_scored({"candidate": one, "source": other})
    with pytest.raises(ValueError, match="1 of 2 models"):
        scores.dump_scored({"candidate": one, "source": Scored(None, "these", "accuracy")})


def with_metadata(text: str) -> bytes:
    header = json.dumps({"__metadata__": {"measured": text}}).encode()
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "measured", ["[]", "3", "null", "[" * 50_000, '{"metric": "m"}', '{"metric": 1, "samples": []}']
)
def test_odd_metadata_is_refused(measured: str) -> None:
    with pytest.raises(CorruptionError, match="reading per-sample scores"):
        scores.load(with_metadata(measured))


@pytest.mark.parametrize("data", [b"", b"\x10" * 40, scores.dump({"s": np.ones(2)}, samples="", metric="")[:-1]])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptionError, match="reading per-sample scores"):
        scores.load(data)
