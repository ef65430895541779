"""Counters of energy: files as the kernel has them, wrapping around, missing, or closed to this user."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpress.profile import energy
from modelpress.reports import Measured, NotMeasured

RANGE = 262_143_328_850


def make_zone(folder: Path, number: str, name: str, microjoules: int) -> Path:
    zone = folder / f"intel-rapl:{number}"
    zone.mkdir(parents=True)
    (zone / "name").write_text(f"{name}\n")
    (zone / "max_energy_range_uj").write_text(f"{RANGE}\n")
    (zone / "energy_uj").write_text(f"{microjoules}\n")
    return zone


def add(zone: Path, microjoules: int) -> None:
    before = int((zone / "energy_uj").read_text())
    (zone / "energy_uj").write_text(f"{(before + microjoules) % (RANGE + 1)}\n")


@given(st.integers(0, RANGE), st.integers(0, RANGE))
def test_a_counter_may_wrap_around_once(before: int, used: int) -> None:
    zone = energy.Zone("package-0", Path(), RANGE)
    assert zone.joules(before, (before + used) % (RANGE + 1)) == pytest.approx(used / 1e6)


def test_joules_of_a_request(tmp_path: Path) -> None:
    packages = [make_zone(tmp_path, "0", "package-0", RANGE - 100), make_zone(tmp_path, "1", "package-1", 5)]
    inner = make_zone(tmp_path, "0:0", "core", 0)  # part of its package: never counted beside it
    memory = make_zone(tmp_path, "0:1", "dram", 0)
    calls = []

    def call() -> None:
        calls.append(1)
        for zone, used in zip((*packages, inner, memory), (3_000_000, 1_000_000, 9_000_000, 500_000), strict=True):
            add(zone, used)

    found = energy.measure(call, 8, 0.02, uses_gpu=False, folder=tmp_path)
    assert isinstance(found.cpu_joules_per_request, Measured)
    assert found.cpu_joules_per_request.value == pytest.approx(0.5)
    assert isinstance(found.memory_joules_per_request, Measured)
    assert found.memory_joules_per_request.value == pytest.approx(0.5 / 8)
    assert isinstance(found.idle_watts, Measured)
    assert found.idle_watts.value == 0.0  # the counters stood still: that is measured
    together = energy.joules_per_request(found)
    assert isinstance(together, Measured)
    assert together.value == pytest.approx(0.5 + 0.5 / 8)


@pytest.mark.parametrize("uses_gpu", [False, True])
def test_a_machine_without_counters_says_so_and_runs_nothing(tmp_path: Path, uses_gpu: bool) -> None:
    found = energy.measure(lambda: pytest.fail("nothing counts"), 1, 0.02, uses_gpu=uses_gpu, folder=tmp_path / "none")
    assert isinstance(found.cpu_joules_per_request, NotMeasured)
    assert "no RAPL counters" in found.cpu_joules_per_request.not_measured
    assert isinstance(found.gpu_joules_per_request, NotMeasured)
    assert isinstance(energy.joules_per_request(found), NotMeasured)
    assert found.metrics() == {}
    assert set(found.unmeasured()) == set(type(found).model_fields)


def test_a_counter_that_cannot_be_read_is_a_reason(tmp_path: Path) -> None:
    zone = make_zone(tmp_path, "0", "package-0", 0)
    (zone / "energy_uj").unlink()
    found = energy.find_zones(tmp_path)
    assert isinstance(found, str)
    assert "energy_uj" in found
    (zone / "energy_uj").write_text("much\n")
    assert isinstance(energy.find_zones(tmp_path), str)
