"""Made-up inputs of golden samples: nobody's data, the same on each machine, and enough to find a broken weight."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from modelpress import golden, golden_inputs, graph
from modelpress.checkpoint import Checkpoint
from modelpress.config import ExportConfig, QuantizeConfig
from modelpress.errors import SelfTestError, WorkloadError
from modelpress.export import export
from modelpress.golden_inputs import of_workload, synthetic
from modelpress.quantize import quantize
from modelpress.workload import Workload
from tests.toys import ImageToy, TextToy

PINNED = {
    "pixels": "b518b08b9e7ed1fbe4a2fe82798afcebd8f978e0538a687a3142905cfe0b6f15",
    "ids": "58656fcb5f64e9d89292dbc6d4f45942be3a51d8d000d7ac834eb4a994b23707",
}


def observed() -> dict[str, np.ndarray]:
    return {
        "pixels": np.linspace(-1.25, 2.5, 64, dtype=np.float32).reshape(4, 4, 4),
        "ids": np.arange(3, 51, dtype=np.int64).reshape(4, 12),
    }


@pytest.mark.parametrize("name", PINNED)
def test_the_bytes_are_those_that_they_always_were(name: str) -> None:
    """Whatever numpy's own generators do: a repeated run must publish the same pack."""
    assert hashlib.sha256(synthetic(observed(), 4)[name].tobytes()).hexdigest() == PINNED[name]


dtypes = st.sampled_from([np.float32, np.float16, np.int64, np.int32, np.uint8, np.bool_])


@given(dtypes.flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=1, max_dims=3, max_side=6))), st.data())
def test_types_shapes_and_ranges_are_kept(array: np.ndarray, data: st.DataObject) -> None:
    if array.dtype.kind == "f":
        array = np.nan_to_num(array, nan=0.0, posinf=1e3, neginf=-1e3)
    rows = data.draw(st.integers(1, 8))
    made = synthetic({"x": array}, rows)["x"]
    assert (made.dtype, made.shape) == (array.dtype, (rows, *array.shape[1:]))
    if array.dtype.kind == "f":
        assert np.isfinite(made).all()
        room = 0.01 * max(1e-6, float(np.abs(array.astype(np.float64)).max()))
        assert made.min() >= float(array.min()) - room
        assert made.max() <= float(array.max()) + room
    else:
        assert array.min() <= made.min()
        assert made.max() <= array.max()


def test_the_ends_of_integers_hold() -> None:
    wide = np.array([[np.iinfo(np.int64).min, np.iinfo(np.int64).max]])
    assert synthetic({"x": wide}, 3)["x"].dtype == np.int64
    assert synthetic({"x": np.array([[np.iinfo(np.uint64).max]])}, 3)["x"].tolist() == [[2**64 - 1]] * 3


def test_masks_hide_nothing_and_rows_differ() -> None:
    made = synthetic(
        {
            "attention_mask": np.array([[1, 1, 0], [1, 0, 0]]),
            "token_type_ids": np.array([[0, 0, 1], [0, 1, 1]]),
            "ids": np.array([[5, 9, 7], [6, 8, 100]]),
        },
        4,
    )
    assert (made["attention_mask"] == 1).all()
    assert set(np.unique(made["token_type_ids"])) == {0, 1}
    assert len({row.tobytes() for row in made["ids"]}) == 4


def test_nothing_of_a_sample_comes_back() -> None:
    workload = TextToy()
    real = {row.numpy().tobytes() for tensor in workload.example(16).values() for row in tensor}
    for name, array in of_workload(workload, 4).items():
        if "mask" not in name:
            assert not {row.tobytes() for row in array} & real
    images = ImageToy()
    pixels = np.unique(images.example(16)["x"].numpy())
    assert not np.isin(of_workload(images, 4)["x"], pixels[1:-1]).any(), "not one pixel but the ends of the range"


# ---- power: what is broken is found as with real samples

Fault = Callable[[torch.Tensor], torch.Tensor]


def sign_turned(weight: torch.Tensor) -> torch.Tensor:
    flat = weight.clone().reshape(-1)
    place = flat.to(torch.float32).abs().argmax()
    flat[place] = -flat[place]
    return flat.reshape(weight.shape)


def scaled(weight: torch.Tensor) -> torch.Tensor:
    return (weight.to(torch.float32) * 1.05).to(weight.dtype)


def swapped(weight: torch.Tensor) -> torch.Tensor:
    other = weight.clone()
    other[[0, 1]] = weight[[1, 0]]
    return other


def zeroed(weight: torch.Tensor) -> torch.Tensor:
    other = weight.clone()
    other[0] = 0
    return other


FAULTS = {"sign": sign_turned, "5 %": scaled, "rows": swapped, "a row gone": zeroed}


def found(checkpoint: Checkpoint, inputs: dict[str, np.ndarray], classes: bool) -> set[tuple[str, str]]:
    """Weight and fault, of each that the self-test finds."""
    made = golden.make(checkpoint, inputs, classes=classes)
    assert made is not None
    caught = set()
    for name, weight in checkpoint.tensors.items():
        if weight.ndim < 2 or weight.shape[0] < 2:
            continue
        for kind, fault in FAULTS.items():
            broken = replace(checkpoint, tensors=checkpoint.tensors | {name: fault(weight).contiguous()})
            session = graph.session(broken, threads=1)
            names = [one.name for one in session.get_outputs()]
            try:
                golden.check(made, dict(zip(names, session.run(None, made.inputs), strict=True)), "testing")
            except SelfTestError:
                caught.add((name, kind))
    return caught


@pytest.fixture(scope="module")
def cases() -> dict[str, tuple[Checkpoint, Workload]]:
    images, texts = ImageToy(), TextToy()
    float_images, float_texts = (export(workload.source(), workload, ExportConfig())[0] for workload in (images, texts))
    return {
        "images in float": (float_images, images),
        "images in static int8": (quantize(float_images, images, QuantizeConfig(method="static"))[0], images),
        "texts in float": (float_texts, texts),
        "texts in dynamic int8": (quantize(float_texts, texts, QuantizeConfig(method="dynamic"))[0], texts),
    }


CASES = ["images in float", "images in static int8", "texts in float", "texts in dynamic int8"]


@pytest.mark.parametrize("case", CASES)
def test_noise_finds_what_real_samples_find(cases: dict[str, tuple[Checkpoint, Workload]], case: str) -> None:
    checkpoint, workload = cases[case]
    real = {name: tensor.numpy() for name, tensor in workload.example(4).items()}
    classes = workload.outputs == "logits"
    by_real, by_noise = (found(checkpoint, inputs, classes) for inputs in (real, of_workload(workload, 4)))
    assert by_real, "something is found at all"
    assert by_real <= by_noise
    if "float" in case:
        assert any(fault == "sign" for _, fault in by_noise), "one turned sign"


def test_a_model_that_noise_does_not_fit_is_told_the_way_out() -> None:
    """Its input is an index that must not be larger than the table: what was observed was not all of it."""
    checkpoint, _ = export(TextToy().source(), TextToy(), ExportConfig())
    inputs = of_workload(TextToy(), 2)
    name = next(one for one in inputs if "mask" not in one)
    inputs[name] = np.full_like(inputs[name], 10**6)
    with pytest.raises(WorkloadError, match=r"upload\.golden_inputs: calibration"):
        golden.make(checkpoint, inputs, classes=False)
    assert golden_inputs.OBSERVED >= 4
