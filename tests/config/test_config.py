"""A config says what is legal: typos are named, values checked, nothing rewritten, the same text gives the same key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from modelpress import config as c
from modelpress.errors import ConfigError

DIGITS: dict[str, Any] = {
    "name": "digits",
    "workload": {"kind": "image-classification", "model": "digits-cnn", "data": "digits"},
}
SECTIONS = [value for value in vars(c).values() if isinstance(value, type) and issubclass(value, c.Config)]


def test_least_config_is_legal() -> None:
    config = c.parse_config(DIGITS)
    assert config.distill is None
    assert config.prune is None
    assert config.compress is not None


@pytest.mark.parametrize(
    ("change", "field", "legal"),
    [
        ({"prunne": {}}, "prunne", "prune"),
        ({"prune": {"methd": "structured"}}, "prune.methd", "method"),
        ({"prune": {"recovery": {"lr": 0.1}}}, "prune.recovery.lr", "learning_rate"),
        ({"workload": DIGITS["workload"] | {"dataset": "x"}}, "workload.dataset", "data"),
    ],
)
def test_typo_names_the_field_and_what_is_legal(change: dict[str, Any], field: str, legal: str) -> None:
    with pytest.raises(ConfigError) as caught:
        c.parse_config(DIGITS | change, origin="recipe.yaml")
    message = str(caught.value)
    assert "recipe.yaml" in message
    assert f"{field}: unknown field" in message
    assert legal in message.split("legal here:")[1]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"name": "Digits!"}, "name: String should match pattern"),
        (
            {"quantize": {"method": "fp3"}},
            "quantize.method: Input should be 'dynamic', 'static', 'weight-only' or 'codebook' (found 'fp3')",
        ),
        ({"quantize": {}, "plan": {}}, "plan and quantize exclude each other"),
        ({"plan": {"num_bits": [8, 8]}}, "plan.num_bits must not repeat"),
        ({"plan": {"kernels": ["int8"]}}, "plan.kernels is only read with plan.objective 'seconds'"),
        (
            {"plan": {"objective": "seconds", "sparsity": [0.0]}},
            "plan.sparsity is only read with plan.objective 'bytes'",
        ),
        ({"plan": {"objective": "seconds", "group_sizes": [24]}}, "must be powers of two from 16 on"),
        ({"plan": {"objective": "seconds", "group_sizes": []}}, "plan.group_sizes must not be empty"),
        ({"plan": {"sparsity": [0.5]}}, "plan.sparsity must hold 0"),
        ({"plan": {"scales": [], "group_sizes": []}}, "plan.scales and plan.group_sizes must not both be empty"),
        ({"quantize": {"num_bits": 4}}, "num_bits must be 8 when quantize.method is 'static'"),
        ({"quantize": {"method": "weight-only", "num_bits": 5}}, "num_bits must be 4 or 8 when"),
        ({"quantize": {"method": "weight-only", "recovery": {}}}, "recovery needs quantize.method"),
        ({"quantize": {"recovery": {}}}, "recovery with method 'static' needs quantize.smooth 0"),
        ({"quantize": {"method": "weight-only", "group_size": 48}}, "group_size must be a power of two"),
        ({"quantize": {"algorithm": "rtn", "act_order": True}}, "act_order needs quantize.algorithm 'gptq'"),
        ({"quantize": {"method": "weight-only", "algorithm": "hqq"}}, "'hqq' needs quantize.symmetric false"),
        ({"prune": {"sparsity": 1.0}}, "prune.sparsity: Input should be less than 1 (found 1.0)"),
        ({"shard": {"max_shard_size": 0}}, "shard.max_shard_size: Input should be greater than 0 (found 0)"),
        ({"distill": {"student": "layer-drop"}}, "distill.keep_layers is needed"),
        ({"distill": {"student": "layer-drop", "keep_layers": [3, 1]}}, "must rise and not repeat"),
        (
            {"distill": {"student": "layer-drop", "keep_layers": [0], "architecture": {"hidden": 8}}},
            "distill.architecture needs distill.student 'architecture'",
        ),
        (
            {"prune": {"method": "sparsegpt", "pattern": "2:4", "sparsity": 0.6}},
            "prune.pattern '2:4' has a sparsity of 0.5 (found 0.6)",
        ),
        ({"prune": {"structures": []}}, "prune.structures names nothing to remove"),
        ({"prune": {"pattern": "4:8"}}, "prune.pattern '4:8' needs a method that sets weights to zero"),
        ({"prune": {"method": "wanda", "pattern": "3:4"}}, "'unstructured', '2:4' or '4:8' (found '3:4')"),
        (
            {"prune": {"method": "wanda", "pattern": "2:4", "steps": 2, "recovery": {}}},
            "prune.steps must be 1 with prune.pattern '2:4'",
        ),
        ({"prune": {"method": "wanda", "scope": "global"}}, "needs prune.method 'magnitude' and no pattern"),
        (
            {"prune": {"method": "magnitude", "scope": "global", "pattern": "2:4"}},
            "needs prune.method 'magnitude' and no pattern",
        ),
        (
            {"prune": {"method": "wanda", "structures": ["heads"]}},
            "prune.structures is only read with prune.method 'structured'",
        ),
        (
            {"prune": {"method": "wanda", "importance": "taylor"}},
            "prune.importance is only read with prune.method 'structured'",
        ),
        ({"prune": {"method": "wanda", "repair": False}}, "prune.repair is only read with prune.method 'structured'"),
        ({"prune": {"structures": ["layers", "heads"]}}, "'layers' stands alone (found layers, heads)"),
        (
            {"prune": {"structures": ["layers"], "importance": "magnitude"}},
            "'layers' needs prune.importance 'activation' or 'taylor'",
        ),
        ({"prune": {"steps": 2, "recovery": {}}}, "prune.steps needs a method that sets weights to zero"),
        ({"prune": {"method": "wanda", "steps": 2}}, "prune.steps needs prune.recovery with an epoch for each step"),
        (
            {"prune": {"method": "wanda", "steps": 3, "recovery": {"epochs": 2}}},
            "prune.steps needs prune.recovery with an epoch for each step",
        ),
        ({"distill": {"keep_layers": [0]}}, "distill.keep_layers needs distill.student 'layer-drop'"),
        ({"distill": {"student": "width-slice"}}, "distill.keep_width is needed"),
        ({"distill": {"keep_width": 0.5}}, "only then"),
        ({"distill": {"student": "width-slice", "keep_width": 0.5, "architecture": {"hidden": 8}}}, "'architecture'"),
        ({"distill": {"cache_top_k": 8, "alpha": 0.0}}, "alpha above 0"),
        ({"distill": {"cache_top_k": 8, "hidden_weight": 1.0}}, "must be 0"),
        ({"distill": {"divergence": "js"}}, "forward-kl"),
        ({"quantize": {"method": "codebook", "num_bits": 4, "smooth": 0.5}}, "quantize.smooth is only read with"),
        ({"quantize": {"algorithm": "rtn"}}, "quantize.algorithm is only read with quantize.method 'weight-only'"),
        ({"quantize": {"percentile": 99.0}}, "is only read with quantize.method 'static' and quantize.calibration"),
        ({"prune": {"damping": 0.1}}, "prune.damping is only read with prune.method 'sparsegpt'"),
        ({"prune": {"recovery_hidden_weight": 0.0}}, "is only read with prune.recovery"),
        ({"workload": DIGITS["workload"] | {"length": 64}}, "workload.length is only read with workload.kind"),
        ({"workload": DIGITS["workload"] | {"options": {"a": 1}}}, "workload.options is only read with"),
        ({"workload": {"kind": "custom"}}, "workload.factory must be"),
        ({"workload": {"kind": "sentence-embedding"}}, "workload.model and workload.data are needed"),
    ],
)
def test_illegal_value_is_named(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match="checking config") as caught:
        c.parse_config(DIGITS | change)
    assert expected in str(caught.value)


def test_a_default_that_nothing_reads_may_be_spelt_out() -> None:
    config = c.QuantizeConfig(method="codebook", num_bits=4)
    assert c.QuantizeConfig.model_validate(config.model_dump()) == config


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        c.parse_config(DIGITS | {"name": "X", "prune": {"sparsity": 2}, "qantize": {}})
    assert all(word in str(caught.value) for word in ("name:", "prune.sparsity:", "qantize:"))


@pytest.mark.parametrize(("text", "expected"), [("- a\n", "list"), ("a: [", "parsing"), ("", "NoneType")])
def test_file_that_is_no_mapping(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)) as caught:
        c.load_config(path)
    assert expected in str(caught.value)


def test_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reading config"):
        c.load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_field_has_a_help_text(section: type[BaseModel]) -> None:
    assert [name for name, field in section.model_fields.items() if not field.description] == []


def test_configs_are_frozen() -> None:
    config = c.parse_config(DIGITS)
    with pytest.raises(ValidationError):
        config.name = "other"  # type: ignore[misc]


@given(st.floats(min_value=0.01, max_value=0.99), st.floats(min_value=0.01, max_value=0.99))
def test_fingerprint_follows_the_values(first: float, second: float) -> None:
    one, two = c.PruneConfig(sparsity=first), c.PruneConfig(sparsity=second)
    assert (one.fingerprint() == two.fingerprint()) == (first == second)
    assert one.fingerprint() == c.PruneConfig.model_validate(one.model_dump()).fingerprint()
