"""What compilers for other processors ask of a session: a cache of each model's own, and one row at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from modelpress import graph, providers
from modelpress.checkpoint import Checkpoint
from modelpress.compiled import digest, with_own_cache
from modelpress.config import ExportConfig
from modelpress.errors import SetupError
from modelpress.export import export
from modelpress.place import provider_options
from modelpress.providers import CPU, CUDA, MIGRAPHX, PROVIDERS, TENSORRT, VITIS_AI
from tests.toys import ImageToy, TextToy


@pytest.fixture(scope="module")
def versions() -> list[Checkpoint]:
    """Two models of one graph with other weights."""
    toy = ImageToy()
    first, _ = export(toy.module, toy, ExportConfig())
    moved = {name: tensor + 1 for name, tensor in first.tensors.items()}
    return [first, Checkpoint("onnx", moved, first.files)]


def test_two_versions_of_a_model_never_share_what_was_compiled(versions: list[Checkpoint], tmp_path: Path) -> None:
    assert versions[0].files == versions[1].files, "a cache that goes by the graph can't tell them"
    for provider, name in ((MIGRAPHX, "migraphx_model_cache_dir"), (TENSORRT, "trt_engine_cache_path")):
        given = {name: str(tmp_path), "device_id": "1"}
        first, second = (with_own_cache(provider, given, one) for one in versions)
        assert first != second
        assert first == with_own_cache(provider, given, versions[0])
        for told in (first, second):
            assert told["device_id"] == "1"
            assert Path(told[name]).parent == tmp_path
            assert Path(told[name]).is_dir()
    first, second = (with_own_cache(VITIS_AI, {"cache_dir": str(tmp_path)}, one) for one in versions)
    assert first["cache_dir"] == second["cache_dir"] == str(tmp_path)
    assert first["cache_key"] != second["cache_key"]
    assert with_own_cache(CUDA, {"device_id": "1"}, versions[0]) == {"device_id": "1"}
    assert with_own_cache(MIGRAPHX, {}, versions[0]) == {}


def test_a_digest_sees_names_types_and_shapes() -> None:
    def of(tensors: dict[str, torch.Tensor], files: dict[str, bytes] | None = None) -> str:
        return digest(Checkpoint("onnx", tensors, files or {}))

    zeros = torch.zeros(4)
    kinds = [
        of({"a": zeros}), of({"b": zeros}), of({"a": zeros.reshape(2, 2)}), of({"a": zeros.to(torch.int32)}),
        of({"a": zeros + 1}), of({"a": zeros}, {"a": b""}), of({}, {"a": b"b"}), of({}, {"ab": b""}),
    ]  # fmt: skip
    assert len(set(kinds)) == len(kinds)


def test_a_cache_that_cannot_be_written_is_an_error(versions: list[Checkpoint], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="cache") as caught:
        with_own_cache(MIGRAPHX, {"migraphx_model_cache_dir": str(tmp_path / "file")}, versions[0])
    assert "migraphx_model_cache_dir" in str(caught.value.fix)


def test_one_key_for_all_models_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELPRESS_PROVIDER_OPTIONS", '{"VitisAIExecutionProvider": {"cache_key": "digits"}}')
    with pytest.raises(SetupError, match="cache_key"):
        provider_options(VITIS_AI)


@pytest.fixture
def by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's provider, as one that takes fixed shapes alone."""
    fixed = {**PROVIDERS, CPU: dataclasses.replace(PROVIDERS[CPU], one_row=True)}
    monkeypatch.setattr(providers, "PROVIDERS", fixed)


@pytest.mark.usefixtures("by_row")
def test_a_provider_of_fixed_shapes_answers_any_number_of_rows(versions: list[Checkpoint]) -> None:
    session = graph.session(versions[0])
    assert session.get_inputs()[0].shape == [1, 1, 8, 8]
    assert session.get_outputs()[0].shape == [1, 10]
    toy = ImageToy()
    for size in (1, 5):
        inputs = toy.example(size)
        with torch.inference_mode():
            expected = toy.module(**inputs).numpy()
        found = graph.run(session, inputs)
        assert found.shape == (size, 10)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        (named,) = session.run([session.get_outputs()[0].name], {"x": inputs["x"].numpy()})
        np.testing.assert_array_equal(named, found)


@pytest.mark.usefixtures("by_row")
def test_several_inputs_are_cut_at_the_same_rows() -> None:
    toy = TextToy()
    checkpoint, _ = export(toy.module, toy, ExportConfig())
    inputs = toy.example(4)
    with torch.inference_mode():
        expected = toy.module(**inputs).numpy()
    np.testing.assert_allclose(graph.run(graph.session(checkpoint), inputs), expected, atol=1e-4)
