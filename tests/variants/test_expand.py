"""A grid becomes legal recipes, each once; a hostile one is refused with the reason, before anything runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from modelpress.config import OptimizeConfig, VariantsConfig, load_config, parse_variants
from modelpress.errors import ConfigError
from modelpress.variants.expand import MOST, expand, label, parse_setting, trial

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "parallel-tasks.md"
RECIPE = OptimizeConfig.model_validate(
    {
        "name": "small",
        "workload": {"kind": "custom", "factory": "tests.integration.small_workloads:Small"},
        "quantize": {"method": "static", "calibration": "minmax"},
        "profile": {},
        "workers": {"count": 3},
    }
)


def of(**config: Any) -> VariantsConfig:
    return VariantsConfig.model_validate(config)


def refusal(**config: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        expand(RECIPE, of(**config))
    assert caught.value.fix
    return str(caught.value)


@given(
    st.lists(st.sampled_from([0.1, 0.25, 0.5, 0.7]), min_size=1, unique=True),
    st.lists(st.sampled_from([0.0, 0.5, 0.7]), min_size=1, unique=True),
)
def test_a_grid_is_every_combination_once_in_its_order(sparsities: list[float], smooths: list[float]) -> None:
    found = expand(RECIPE, of(grid={"prune.sparsity": sparsities, "quantize.smooth": smooths}))
    seen = [(one.recipe.prune and one.recipe.prune.sparsity, one.recipe.quantize) for one in found]
    assert [(sparsity, quantize and quantize.smooth) for sparsity, quantize in seen] == [
        (sparsity, smooth) for sparsity in sparsities for smooth in smooths
    ]
    assert [one.number for one in found] == list(range(len(found)))
    assert len({one.recipe.fingerprint() for one in found}) == len(found)
    assert len({one.label for one in found}) == len(found)
    for one in found:  # what no variant sets is the recipe's
        assert one.recipe.model_copy(update={"prune": None, "quantize": RECIPE.quantize}) == RECIPE
        assert one.recipe.quantize is not None
        assert one.recipe.quantize.calibration == "minmax"


def test_stages_are_switched_on_off_and_set_as_a_whole() -> None:
    off, whole, below, same = expand(
        RECIPE,
        of(
            also=[
                {"quantize": None},
                {"quantize": {"method": "dynamic"}, "compress": None},
                {"distill.train.epochs": 3, "prune.recovery": {"epochs": 2}},
                {},
            ]
        ),
    )
    assert off.recipe.quantize is None
    assert whole.recipe.quantize is not None
    assert (whole.recipe.quantize.method, whole.recipe.quantize.calibration, whole.recipe.compress) == (
        "dynamic",
        "mse",
        None,
    )
    assert below.recipe.distill is not None
    assert below.recipe.distill.train.epochs == 3
    assert below.recipe.prune is not None
    assert below.recipe.prune.recovery is not None
    assert same.recipe == RECIPE
    assert [one.label for one in (off, same)] == ["quantize=null", "as it is"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"grid": {"prune.sparsty": [0.5]}}, ["prune.sparsty: unknown field", "sparsity"]),
        ({"grid": {"prune.sparsity": [0.5, 1.5]}}, ["prune.sparsity=1.5", "less than 1"]),
        ({"grid": {"name": ["other"]}}, ["name: variants may differ in distill, prune"]),
        ({"also": [{"workload.data": "/other"}]}, ["workload.data: variants may differ in"]),
        ({"grid": {"gate.margin": [0.1, 0.2]}}, ["gate.margin: variants may differ in"]),
        ({"grid": {"": [1]}}, ["variants may differ in"]),
        ({"grid": {"quantize.method.x": [1]}}, ["quantize.method has no fields"]),
        ({"grid": {"prune.": [1]}}, ["unknown field"]),
        ({"also": [{"prune": None, "prune.sparsity": 0.5}]}, ["prune and prune.sparsity, which is a part of it"]),
        ({"grid": {"prune.sparsity": [0.5, 0.5]}}, ["the same recipe twice"]),
        ({"grid": {"prune.sparsity": [0.5]}, "also": [{"prune": {}}]}, ["the same recipe twice", "prune={}"]),
        ({"also": [{}, {"distill.train.parallel.processes": 2}, {"distill": {}}]}, ["the same recipe twice"]),
        ({"grid": {"quantize.method": ["static", "dynamic"]}}, ["quantize.calibration is only read with", "also"]),
        ({"also": [{"quantize": None, "plan.objective": "seconds"}]}, ["beside other variants"]),
        ({"grid": {"plan.max_disagreement": [0.1]}}, ["plan and quantize exclude each other"]),
        ({"grid": {f"quantize.{name}": list(range(20)) for name in "abcdefgh"}}, ["25,600,000,000", f"most {MOST}"]),
    ],
)
def test_a_hostile_grid_is_refused_with_the_reason(config: dict[str, Any], words: list[str]) -> None:
    said = refusal(**config)
    for word in words:
        assert word in said


def test_of_many_illegal_variants_a_few_are_named() -> None:
    said = refusal(grid={"prune.sparsity": [1.0 + one for one in range(12)]})
    assert said.count("prune.sparsity=") == 5
    assert "and 7 more" in said


@pytest.mark.parametrize("document", [{}, {"grid": {}}, {"grid": {"prune.sparsity": []}}, {"girds": {}}, [], None])
def test_an_empty_or_misspelt_grid_is_refused(document: Any) -> None:
    with pytest.raises(ConfigError):
        parse_variants(document)


def test_a_plan_for_seconds_may_be_tried_alone() -> None:
    (one,) = expand(RECIPE, of(also=[{"quantize": None, "plan.objective": "seconds"}], workers=1))
    assert one.recipe.plan is not None


def test_a_trial_measures_quality_and_bytes_and_changes_no_bytes() -> None:
    made = trial(RECIPE)
    assert (made.profile, made.workers, made.promote) == (None, None, False)
    assert OptimizeConfig.model_validate_json(made.model_dump_json()) == made
    for name in ("workload", "distill", "prune", "export", "quantize", "plan", "compress"):
        assert getattr(made, name) == getattr(RECIPE, name)
    assert made.evaluate.max_quality_drop == RECIPE.evaluate.max_quality_drop


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("prune.sparsity=0.5,0.7", ("prune.sparsity", [0.5, 0.7])),
        ("quantize.method=static,dynamic", ("quantize.method", ["static", "dynamic"])),
        ("quantize=null,{method: dynamic}", ("quantize", [None, {"method": "dynamic"}])),
        (
            "prune.structures=[channels],[channels, neurons]",
            ("prune.structures", [["channels"], ["channels", "neurons"]]),
        ),
    ],
)
def test_a_setting_is_read_from_the_command_line(text: str, found: tuple[str, list[Any]]) -> None:
    assert parse_setting(text) == found


@pytest.mark.parametrize("text", ["", "prune.sparsity", "prune.sparsity=", "=0.5", "a=[", "a=}{", "a=1], [2"])
def test_what_is_no_setting_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="reading --set"):
        parse_setting(text)


def test_the_grid_of_the_docs_is_legal_and_names_every_setting() -> None:
    blocks = re.findall(r"^```yaml\n(grid:.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (document,) = map(yaml.safe_load, blocks)
    assert set(document) == set(VariantsConfig.model_fields)
    assert len(expand(load_config(ROOT / "configs" / "digits.yaml"), parse_variants(document))) == 8


def test_labels_say_what_is_set() -> None:
    assert label({"prune.sparsity": 0.5, "quantize": None, "plan": {"num_bits": [4]}}) == (
        'prune.sparsity=0.5, quantize=null, plan={"num_bits": [4]}'
    )
