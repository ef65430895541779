"""Execution providers: one list of names, what a machine tells them, and that none leaves its work to the CPU in
silence."""

from __future__ import annotations

import json
import typing
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from modelpress import graph, place
from modelpress.config import EvaluateConfig, GateConfig, ProfileConfig
from modelpress.errors import ConfigError, SetupError
from modelpress.place import Place, provider_options
from modelpress.probes import probe
from modelpress.providers import (
    CPU,
    CUDA,
    MIGRAPHX,
    PROVIDERS,
    TENSORRT,
    VITIS_AI,
    Provider,
    check_takes_part,
    on_gpu,
    provider_error,
)
from registry.pack_model import PackConfig
from serving.main import ServingSettings

GIVEN = "MODELPRESS_PROVIDER_OPTIONS"
DECLARED = [MIGRAPHX, VITIS_AI]


def test_one_list_of_names_serves_everybody() -> None:
    names = typing.get_args(Provider)
    assert set(names) == set(PROVIDERS)
    for config in (EvaluateConfig, GateConfig, ProfileConfig, PackConfig, ServingSettings):
        annotation = config.model_fields["provider"].annotation
        assert set(names) == {
            name
            for name in typing.get_args(annotation) + sum(map(typing.get_args, typing.get_args(annotation)), ())
            if isinstance(name, str)
        }, config
    assert {name for name in names if on_gpu(name)} == {CUDA, TENSORRT, MIGRAPHX}


@pytest.mark.parametrize("provider", DECLARED)
def test_a_declared_provider_that_is_not_in_this_build_is_an_error_with_the_way_out(provider: str) -> None:
    if provider in onnxruntime.get_available_providers():
        pytest.skip("this build has it")
    with pytest.raises(SetupError, match=provider) as caught:
        graph.session(graph.split(probe(provider)), provider)
    assert PROVIDERS[provider].fix in str(caught.value.fix)
    assert CPU in str(caught.value.fix)


def test_the_ways_out_differ() -> None:
    ways = {str(provider_error(name, "x").fix) for name in (*PROVIDERS, "NoSuchProvider") if name != CPU}
    assert len(ways) == len(PROVIDERS)


def test_the_machine_tells_a_provider_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vitisai_config.json").write_text("{}")
    options = {"config_file": str(tmp_path / "vitisai_config.json"), "cache_dir": str(tmp_path)}
    monkeypatch.setenv(GIVEN, json.dumps({VITIS_AI: options, MIGRAPHX: {"migraphx_fp16_enable": "1"}}))
    assert provider_options(VITIS_AI) == options
    assert provider_options(MIGRAPHX) == {"migraphx_fp16_enable": "1"}
    assert provider_options(CUDA) == {}
    assert provider_options(CPU) == {}
    reset = place._current.set(Place(torch.device("cuda", 1), 2**30))  # what torch's ROCm build calls AMD's GPUs
    try:
        assert provider_options(VITIS_AI) == options
        told = {"migraphx_fp16_enable": "1", "device_id": "1", "migraphx_mem_limit": str(2**30)}
        assert provider_options(MIGRAPHX) == told
    finally:
        place._current.reset(reset)


@pytest.mark.parametrize("name", ["config_file", "xclbin", "cache_dir"])
def test_what_an_option_names_must_be_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = str(tmp_path / "missing")
    monkeypatch.setenv(GIVEN, json.dumps({VITIS_AI: {name: missing}}))
    with pytest.raises(SetupError) as caught:
        provider_options(VITIS_AI)
    assert name in str(caught.value.found)
    assert missing in str(caught.value.found)
    assert GIVEN in str(caught.value.fix)


@pytest.mark.parametrize(
    "value", ["{", "[]", '{"NoSuchProvider": {}}', '{"CPUExecutionProvider": {}}', '{"VitisAIExecutionProvider": 1}']
)
def test_options_that_are_none_are_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GIVEN, value)
    with pytest.raises(ConfigError, match=GIVEN):
        provider_options(VITIS_AI)
    assert provider_options(CPU) == {}, "who asks for the CPU is not stopped by it"


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_graph_that_tries_a_provider_runs(provider: str) -> None:
    session = graph.session(graph.split(probe(provider)), threads=1)
    (taken,) = session.get_inputs()
    (found,) = session.run(None, {taken.name: np.full(taken.shape, 0.5, np.float32)})
    if found.ndim == 1:
        assert found[0] == 0.5
    else:  # 16 × 3 × 3 products of 0.5 and 2⁻⁶, a multiple of the step 2⁻⁶
        assert found[0, 0, 8, 8] == 1.125


def test_a_provider_that_takes_no_part_of_a_graph_is_an_error() -> None:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    model = probe(VITIS_AI).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=[CPU])
    takers = graph._takers(session)
    assert takers == {CPU}, "ONNX Runtime says who took the nodes"
    check_takes_part(CPU, takers)
    check_takes_part(VITIS_AI, {CPU, VITIS_AI})
    check_takes_part(VITIS_AI, set())
    with pytest.raises(SetupError, match="CPUExecutionProvider") as caught:
        check_takes_part(VITIS_AI, takers)
    assert VITIS_AI in caught.value.doing
