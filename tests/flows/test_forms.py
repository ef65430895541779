"""What people fill in: the flows' forms, the deployments that carry them, and the shipped recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import Flow
from prefect.utilities.callables import parameter_schema
from prefect.utilities.importtools import import_object

from flows.canary import canary, promote_canary
from flows.collect import collect
from flows.evaluate import evaluate_published
from flows.jobs import optimize_in_jobs, optimize_part
from flows.optimize import optimize
from flows.promote import promote, rollback
from flows.reconcile import reconcile
from flows.scrub import scrub
from flows.variants import optimize_variants
from modelpress.config import OptimizeConfig, load_canary, load_config, load_variants
from modelpress.variants.expand import expand

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "optimize_schema.json"
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
GRIDS = sorted((ROOT / "configs" / "variants").glob("*.yaml"))
CANARIES = sorted((ROOT / "configs" / "canary").glob("*.yaml"))
OTHERS = (
    promote,
    promote_canary,
    canary,
    rollback,
    reconcile,
    scrub,
    evaluate_published,
    optimize_part,
    optimize_in_jobs,
    optimize_variants,
)
DEPLOYMENTS = yaml.safe_load((ROOT / "infra" / "prefect.yaml").read_text())["deployments"]


def schema(flow: Flow[..., Any]) -> dict[str, Any]:
    return parameter_schema(flow).model_dump_for_openapi()


def test_the_form_of_optimize_is_the_golden_one() -> None:
    """A changed form is a change for everyone who has a schedule: change the golden file knowingly, by hand:
    `python -m tests.flows.test_forms > tests/golden/optimize_schema.json`."""
    assert schema(optimize) == json.loads(GOLDEN.read_text())


def test_every_field_of_the_form_has_help() -> None:
    definitions = schema(optimize)["definitions"]

    def helped(spec: dict[str, Any]) -> bool:  # a field that says just what its model says has the model's help
        target = spec.get("$ref", "").rpartition("/")[2]
        return "description" in spec or "description" in definitions.get(target, {})

    bare = [
        f"{name}.{field}"
        for name, model in definitions.items()
        for field, spec in model.get("properties", {}).items()
        if not helped(spec)
    ]
    assert len(definitions) >= 10
    assert not bare


def test_the_other_forms_are_typed() -> None:
    fields = {flow.name: schema(flow)["properties"] for flow in OTHERS}
    assert set(fields["promote"]) == {"name", "candidate", "gate", "override", "move"}
    assert set(fields["promote-canary"]) == {"name", "candidate", "canary", "gate"}
    assert set(fields["canary"]) == {"name"}
    assert set(fields["rollback"]) == {"name", "alias", "to"}
    assert set(fields["reconcile"]) == {"name"}
    assert set(fields["evaluate-published"]) == {"name", "alias", "gate"}
    assert set(fields["scrub"]) == {"bytes_per_second", "afresh"}
    assert set(fields["optimize-part"]) == {"config", "last"}
    assert set(fields["optimize-in-jobs"]) == {"config", "jobs"}
    assert set(fields["optimize-variants"]) == {"config", "variants"}
    for form in fields.values():
        for name, spec in form.items():
            assert spec.get("type") or spec.get("anyOf") or spec.get("allOf") or spec.get("$ref"), name
            assert spec.get("description"), name


def test_the_form_of_collect_deletes_nothing_unless_asked() -> None:
    fields = schema(collect)["properties"]
    assert set(fields) == {"delete", "grace_hours", "retention"}
    assert fields["delete"]["default"] is False
    assert all(spec.get("description") for spec in fields.values())
    (deployment,) = [found for found in DEPLOYMENTS if found["name"] == "collect"]
    assert deployment["parameters"]["delete"] is False
    assert deployment["schedules"][0]["cron"]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda found: found["name"])
def test_a_deployment_leads_to_its_flow(deployment: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    flow = import_object(deployment["entrypoint"])
    assert isinstance(flow, Flow)
    assert flow.name == deployment["name"].removesuffix("-gpu").removesuffix("-poll")
    defaults = {name: spec.get("default") for name, spec in schema(flow)["properties"].items()}
    for name, value in deployment.get("parameters", {}).items():
        assert value == defaults[name], f"{name}: the deployment says something else than the flow"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_shipped_recipe_is_legal_and_named_like_its_file(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem


@pytest.mark.parametrize("path", CANARIES, ids=lambda path: path.name)
def test_a_shipped_canary_is_legal(path: Path) -> None:
    assert load_canary(path).steps


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.name)
def test_shipped_variants_are_legal_variants_of_the_recipe_of_their_name(path: Path) -> None:
    assert len(expand(load_config(ROOT / "configs" / path.name), load_variants(path))) > 1


def test_a_recipe_and_the_form_are_the_same_thing() -> None:
    config = load_config(ROOT / "configs" / "digits-quick.yaml")
    document = {"config": config.model_dump(mode="json")}
    assert optimize.validate_parameters(document)["config"] == config
    assert OptimizeConfig.model_validate_json(config.model_dump_json()) == config


if __name__ == "__main__":
    print(json.dumps(schema(optimize), indent=1, sort_keys=True))
