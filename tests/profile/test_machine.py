"""The machine: ceilings are measured or have a reason, and each kind of processor is really looked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnxruntime
import torch

from modelpress.profile import machine
from modelpress.profile.kinds import device_kinds
from modelpress.reports import Measured, NotMeasured


def test_ceilings_are_measured_where_a_model_runs() -> None:
    before = torch.get_num_threads()
    found = machine.measure("onnxruntime", "CPUExecutionProvider", 1, 0.01)
    assert torch.get_num_threads() == before
    assert isinstance(found.copy_bytes_per_second, Measured)
    assert isinstance(found.call_seconds, Measured)
    rates = {rate.dtype: rate.flops_per_second for rate in found.matrix_rates}
    assert set(rates) == {"float32", "bfloat16", "float16", "int8"}
    assert isinstance(rates["float32"], Measured)
    assert isinstance(rates["int8"], Measured)
    # Wide bounds that only a wrong unit leaves: between a microcontroller and a supercomputer.
    assert 1e7 < found.copy_bytes_per_second.value < 1e13
    assert 1e7 < rates["float32"].value < 1e15
    assert 1e-9 < found.call_seconds.value < 1e-2
    assert found.threads == 1
    assert found.memory_bytes > 2**20


def test_a_call_in_torch_is_timed_in_torch() -> None:
    found = machine._call("torch", "CPUExecutionProvider", 0.001)
    assert isinstance(found, Measured)
    assert "torch" in found.by
    elsewhere = machine._call("onnxruntime", "CUDAExecutionProvider", 0.001)
    assert isinstance(elsewhere, NotMeasured)


def test_kinds_of_processors_say_what_is_missing(tmp_path: Path) -> None:
    found = {one.kind: one for one in device_kinds(tmp_path)}
    assert list(found) == ["cpu", "cuda", "rocm", "tpu", "fpga"]
    assert found["cpu"].usable
    assert found["cuda"].usable == torch.cuda.is_available()
    for kind in ("rocm", "tpu", "fpga"):
        assert not found[kind].usable
        assert not found[kind].by
    packaged = any(importlib.util.find_spec(name) for name in ("torch_xla", "jax"))
    assert ("torch_xla" in found["tpu"].found) != packaged
    provided = "VitisAIExecutionProvider" in onnxruntime.get_available_providers()
    assert ("VitisAIExecutionProvider" in found["fpga"].found) != provided
    assert str(tmp_path / "kfd") in found["rocm"].found


def test_a_device_without_its_software_is_not_usable(tmp_path: Path) -> None:
    (tmp_path / "accel0").touch()
    (tmp_path / "kfd").touch()
    (tmp_path / "xclmgmt256").touch()
    found = {one.kind: one for one in device_kinds(tmp_path)}
    if not any(importlib.util.find_spec(name) for name in ("torch_xla", "jax")):
        assert not found["tpu"].usable
        assert "accel0" not in found["tpu"].found
    if "VitisAIExecutionProvider" not in onnxruntime.get_available_providers():
        assert not found["fpga"].usable
        assert "no board" not in found["fpga"].found
    assert "kfd" not in found["rocm"].found


def test_the_faster_of_two_ceilings_counts() -> None:
    slow, fast, none = Measured(value=1.0), Measured(value=2.0), NotMeasured(not_measured="no kernel")
    assert machine.faster(slow, fast) == machine.faster(fast, slow) == fast
    assert machine.faster(none, slow) == machine.faster(slow, none) == slow
    assert machine.faster(none, none) == none
