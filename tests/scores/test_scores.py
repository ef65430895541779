"""Per-sample scores as a file: exact, the same bytes every time, and refused where they are not that."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from modelpress import scores
from modelpress.errors import CorruptionError
from modelpress.scores import Scored

VECTORS = st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=50)


def one(vector: np.ndarray, samples: str = "these", metric: str = "accuracy") -> Scored:
    return Scored(vector, samples, metric)


@given(VECTORS, st.text(max_size=20), st.text(max_size=20), st.text(min_size=1, max_size=9))
def test_a_round_trip_is_exact(values: list[float], samples: str, metric: str, name: str) -> None:
    vector = np.array(values)
    mask = vector > 0
    before = Scored(vector, samples, metric, {name: -vector}, {name: mask})
    found = scores.load(scores.dump({"scores": before}))["scores"]
    assert found.scores is not None
    assert found.scores.tobytes() == vector.tobytes()
    assert found.further[name].tobytes() == (-vector).tobytes()
    assert (found.samples, found.metric) == (samples, metric)
    assert found.slices[name].dtype == np.bool_
    assert found.slices[name].tolist() == mask.tolist()


def test_a_pack_of_two_models_keeps_what_belongs_to_each() -> None:
    first = Scored(np.ones(3), "these", "accuracy", {"f1": np.zeros(3)}, {"left": np.array([True, False, True])})
    second = Scored(np.zeros(3), "these", "accuracy", {"f1": np.ones(3), "mrr": np.ones(3)}, first.slices)
    found = scores.load(scores.dump({"candidate": first, "source": second}))
    assert set(found) == {"candidate", "source"}
    assert set(found["candidate"].further) == {"f1"}
    assert set(found["source"].further) == {"f1", "mrr"}
    assert found["source"].slices["left"].tolist() == [True, False, True]


def test_scores_without_slices_are_written_as_they_always_were() -> None:
    """Packs keep their digests: nothing is added where nothing is there."""
    data = scores.dump({"candidate": one(np.ones(2)), "source": one(np.zeros(2))})
    assert set(safetensors.numpy.load(data)) == {"candidate", "source"}


def test_the_same_scores_are_the_same_bytes_in_every_process() -> None:
    code = (
        "import sys, numpy, modelpress.scores as s;"
        "mask = {'a': numpy.ones(3, bool), 'b': numpy.zeros(3, bool)};"
        "made = lambda v: s.Scored(v, 'x', 'y', {'z': v, 'w': v}, mask);"
        "scored = {'source': made(numpy.ones(3)), 'candidate': made(numpy.zeros(3))};"
        "sys.stdout.buffer.write(s.dump(scored))"
    )
    written = {subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout for _ in range(4)}
    assert len(written) == 1


def test_scores_of_other_samples_are_not_packed_together() -> None:
    with pytest.raises(ValueError, match="2 sets of samples"):
        scores.dump({"candidate": one(np.ones(3)), "source": one(np.ones(3), samples="those")})
    with pytest.raises(ValueError, match="1 of 2 models"):
        scores.dump({"candidate": one(np.ones(3)), "source": Scored(None, "these", "accuracy")})


@pytest.mark.parametrize("name", ["slices", "a/b"])
def test_a_model_is_not_called_like_a_slice(name: str) -> None:
    with pytest.raises(ValueError, match="no name of a model"):
        scores.dump({name: one(np.ones(3))})


def with_metadata(text: str) -> bytes:
    header = json.dumps({"__metadata__": {"measured": text}}).encode()
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "measured", ["[]", "3", "null", "[" * 50_000, '{"metric": "m"}', '{"metric": 1, "samples": []}']
)
def test_odd_metadata_is_refused(measured: str) -> None:
    with pytest.raises(CorruptionError, match="reading per-sample scores"):
        scores.load(with_metadata(measured))


ABOUT = {"measured": json.dumps({"metric": "m", "samples": "s"})}


@pytest.mark.parametrize(
    "vectors",
    [
        {"candidate": np.ones(3), "source": np.ones(4)},
        {"candidate": np.ones((3, 1))},
        {"candidate": np.ones(3), "slices/a": np.full(3, 2, np.uint8)},
        {"candidate": np.ones(3), "slices/a": np.ones(3)},
        {"candidate": np.ones(3), "slices/a": np.ones(2, np.uint8)},
    ],
    ids=str,
)
def test_vectors_that_do_not_belong_together_are_refused(vectors: dict[str, np.ndarray]) -> None:
    with pytest.raises(CorruptionError, match="reading per-sample scores"):
        scores.load(bytes(safetensors.numpy.save(vectors, ABOUT)))


@pytest.mark.parametrize("data", [b"", b"\x10" * 40, scores.dump({"s": one(np.ones(2), "", "")})[:-1]])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptionError, match="reading per-sample scores"):
        scores.load(data)
