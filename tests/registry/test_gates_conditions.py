"""The gate's other conditions: each bound, met, unmet and not measured."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from pydantic import ValidationError

from modelpress.config import GateConfig, OptimizeConfig
from registry.gates import Check, Figures, Origin, decide
from tests.registry.test_gates import GATE, PUBLISHED, evidence

SERVING = Figures("CPUExecutionProvider", p99_seconds=0.004, throughput_per_second=900.0)
HERE = {"c7i": SERVING}
ORIGIN = Origin("Apache-2.0", missing=())


def check(name: str, gate: dict[str, object], **changes: object) -> Check | None:
    config = GateConfig.model_validate(GATE.model_dump() | gate)
    return next((one for one in decide(evidence(**changes), config).checks if one.name == name), None)


@pytest.mark.parametrize(
    ("name", "gate", "changes", "verdict"),
    [
        ("size", {"max_published_bytes": 900}, {}, "pass"),
        ("size", {"max_published_bytes": 899}, {}, "fail"),
        ("size", {"max_published_bytes": 899}, {"published": None}, "fail"),
        ("quantization coverage", {"min_quantization_coverage": 0.9}, {}, "pass"),
        ("quantization coverage", {"min_quantization_coverage": 0.91}, {}, "fail"),
        ("pruning coverage", {}, {"pruned": True, "pruning_coverage": 0.1}, "pass"),
        ("pruning coverage", {}, {"pruned": True, "pruning_coverage": 0.0}, "fail"),
        ("pruning coverage", {}, {"pruned": True}, "fail"),
        ("pruning coverage", {"min_pruning_coverage": 0.2}, {"pruned": True, "pruning_coverage": 0.1}, "fail"),
        ("pruning coverage", {}, {"pruned": True, "pruning_coverage": math.nan}, "fail"),
        ("published bytes", {}, {}, "pass"),
        ("signature", {"require_signature": True}, {}, "fail"),
        ("signature", {"require_signature": True}, {"published": replace(PUBLISHED, signed_by=())}, "fail"),
        ("signature", {"require_signature": True}, {"published": replace(PUBLISHED, signed_by=("farm",))}, "pass"),
        ("lineage", {"require_lineage": True}, {"origin": ORIGIN}, "pass"),
        ("lineage", {"require_lineage": True}, {"origin": replace(ORIGIN, missing=("source",))}, "fail"),
        ("lineage", {"require_lineage": True}, {}, "fail"),
        ("licence", {"licences": ["mit", "apache-*"]}, {"origin": ORIGIN}, "pass"),
        ("licence", {"licences": ["MIT"]}, {"origin": ORIGIN}, "fail"),
        ("licence", {"licences": ["*"]}, {"origin": ORIGIN}, "pass"),
        ("licence", {"licences": ["*"]}, {"origin": replace(ORIGIN, licence="unknown")}, "fail"),
        ("licence", {"licences": ["*"]}, {"origin": replace(ORIGIN, licence=" ")}, "fail"),
        ("licence", {"licences": ["*"]}, {}, "fail"),
    ],
)
def test_bounds(name: str, gate: dict[str, object], changes: dict[str, object], verdict: str) -> None:
    found = check(name, gate, **changes)
    assert found is not None
    assert found.verdict == verdict


@pytest.mark.parametrize(
    ("gate", "name", "figures", "verdict"),
    [
        ({"max_p99_seconds": 0.004}, "p99", HERE, "pass"),
        ({"max_p99_seconds": 0.0039}, "p99", HERE, "fail"),
        ({"max_p99_seconds": 0.004}, "p99", {"c7i": replace(SERVING, p99_seconds=None)}, "fail"),
        ({"max_p99_seconds": 0.004}, "p99", {"c7i": replace(SERVING, p99_seconds=math.nan)}, "fail"),
        ({"min_throughput_per_second": 900}, "throughput", HERE, "pass"),
        ({"min_throughput_per_second": 901}, "throughput", HERE, "fail"),
        ({"min_throughput_per_second": 1}, "throughput", {"c7i": replace(SERVING, throughput_per_second=None)}, "fail"),
        ({"provider": "CPUExecutionProvider"}, "execution provider", HERE, "pass"),
        ({"provider": "CUDAExecutionProvider"}, "execution provider", HERE, "fail"),
        ({"provider": "CPUExecutionProvider"}, "execution provider", {"c7i": replace(SERVING, provider=None)}, "fail"),
    ],
)
def test_figures_of_the_serving_hardware(
    gate: dict[str, object], name: str, figures: dict[str, Figures], verdict: str
) -> None:
    found = check(name, gate | {"hardware": "c7i"}, figures=figures)
    assert found is not None
    assert found.verdict == verdict
    assert "on c7i" in found.reason


@pytest.mark.parametrize(("figures", "known"), [({"laptop": SERVING}, "laptop"), ({}, "no class that has a name")])
def test_figures_of_other_hardware_do_not_count_and_the_way_out_is_named(
    figures: dict[str, Figures], known: str
) -> None:
    asked = {"hardware": "c7i", "max_p99_seconds": 1.0}
    found = check("figures on c7i", asked, figures=figures)
    assert found is not None
    assert found.verdict == "inconclusive"
    assert f"measured on {known}; set MODELPRESS_HARDWARE=c7i" in found.reason
    assert check("p99", asked, figures=figures) is None


def test_nothing_is_asked_by_default() -> None:
    names = {one.name for one in decide(evidence(), GateConfig()).checks}
    assert names == {
        *("quality against the source", "quality against the champion", "compression ratio"),
        *("quantization coverage", "published bytes"),
    }


@pytest.mark.parametrize(
    "gate",
    [
        {"max_p99_seconds": 0.1},
        {"provider": "CPUExecutionProvider"},
        {"hardware": "c7i"},
        {"hardware": "C7i", "max_p99_seconds": 0.1},
        {"further_margins": {"f1": 0}},
        {"slice_margin": -1},
        {"slice_floors": {"a": math.nan}},
        {"further_margins": {"f1": math.inf}},
        {"min_pruning_coverage": 1.5},
    ],
    ids=str,
)
def test_a_bound_that_says_nothing_is_refused(gate: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        GateConfig.model_validate(gate)


@pytest.mark.parametrize("gate", [{"slice_margin": 0.1}, {"slice_floors": {"class 1": 0.5}}], ids=str)
def test_a_recipe_whose_gate_asks_for_slices_has_some(gate: dict[str, object]) -> None:
    workload = {"kind": "image-classification", "model": "digits-cnn", "data": "digits"}
    with pytest.raises(ValidationError, match=r"need workload\.slice_by_class"):
        OptimizeConfig.model_validate({"name": "demo", "workload": workload, "gate": gate})
    OptimizeConfig.model_validate({"name": "demo", "workload": workload | {"slice_by_class": True}, "gate": gate})
    own = {"kind": "custom", "factory": "a:b"}
    OptimizeConfig.model_validate({"name": "demo", "workload": own, "gate": gate})
    with pytest.raises(ValidationError, match=r"workload\.slice_by_class is only read"):
        OptimizeConfig.model_validate({"name": "demo", "workload": own | {"slice_by_class": True}})


def test_a_recipe_that_measures_on_another_provider_than_its_gate_asks_for_is_refused() -> None:
    recipe = {
        "name": "demo",
        "workload": {"kind": "image-classification", "model": "digits-cnn", "data": "digits"},
        "gate": {"hardware": "a10g", "provider": "CUDAExecutionProvider"},
    }
    with pytest.raises(ValidationError, match=r"gate\.provider needs evaluate\.provider CUDAExecutionProvider"):
        OptimizeConfig.model_validate(recipe)
    OptimizeConfig.model_validate(recipe | {"evaluate": {"provider": "CUDAExecutionProvider"}})
