"""How far two models disagree on a request, by what is asked of the comparison."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from serving.mirror import disagreement


@pytest.mark.parametrize(
    ("one", "other", "compare", "expected"),
    [
        ([[0.1, 0.9], [0.8, 0.2]], [[0.4, 0.6], [0.9, 0.1]], "argmax", 0.0),
        ([[0.1, 0.9], [0.8, 0.2]], [[0.6, 0.4], [0.9, 0.1]], "argmax", 0.5),
        ([[0.1, 0.9], [0.8, 0.2]], [[0.1, 0.9], [0.8, np.nan]], "argmax", 0.5),
        ([[1.0], [2.0]], [[1.04], [3.0]], "argmax", 0.5),
        ([1.0, 2.0], [1.04, 3.0], "argmax", 0.5),
        ([[1.0, 10.0]], [[1.4, 10.0]], "values", 0.0),
        ([[1.0, 10.0]], [[1.6, 10.0]], "values", 1.0),
        ([[0.0]], [[0.0]], "values", 0.0),
        ([[0.0]], [[1e-9]], "values", 1.0),
        ([[np.inf]], [[np.inf]], "values", 1.0),
        ([[1, 2], [3, 4]], [[1, 2], [3, 5]], "values", 0.5),
        ([[1, 2]], [[1, 2, 3]], "values", 1.0),
        ([[1, 2]], [[1.0, 2.0]], "values", 1.0),
        (7, 7, "argmax", 0.0),
        (7.0, 8.0, "argmax", 1.0),
    ],
)
def test_what_disagreement_is(one: Any, other: Any, compare: Any, expected: float) -> None:
    assert disagreement({"y": np.array(one)}, {"y": np.array(other)}, compare, 0.05) == expected


def test_a_sample_disagrees_where_any_output_does_and_an_output_that_is_missing_is_all_of_it() -> None:
    one = {"a": np.zeros((4, 2)), "b": np.zeros(4, np.int64)}
    other = {"a": np.zeros((4, 2)), "b": np.array([0, 1, 0, 0])}
    assert disagreement(one, other, "argmax", 0.05) == 0.25
    assert disagreement(one, {"a": one["a"]}, "argmax", 0.05) == 1.0
    uneven = {"a": np.zeros((4, 2)), "b": np.zeros(3)}
    assert disagreement(uneven, {"a": np.zeros((4, 2)), "b": np.ones(3)}, "values", 0.05) == 1.0


floats = arrays.arrays(np.float32, arrays.array_shapes(max_dims=3, max_side=4))


@given(floats, st.sampled_from(["argmax", "values"]))
def test_equal_finite_answers_agree_and_the_share_is_one(array: np.ndarray, compare: Any) -> None:
    finite = np.isfinite(array.reshape(array.shape[0], -1)).all(axis=1)
    assert disagreement({"y": array}, {"y": array.copy()}, compare, 0.05) == pytest.approx(1 - finite.mean())
