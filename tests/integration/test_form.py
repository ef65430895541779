"""The form of `optimize` in a real browser, on a real Prefect server: filled by clicks, refused, run, looked at."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client

from modelpress import pointer
from modelpress.config import OptimizeConfig
from modelpress.store.base import open_store
from tests.browsers import PATIENCE_MILLISECONDS, chromium
from tests.conftest import ROOT
from tests.integration.deploying import at_home, deploy, make_pools, prefect

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAME = "formed"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, prefect_server: str, mlflow_server: str) -> Iterator[Path]:
    """A fresh place for stores; the worker reads it from the environment."""
    home = tmp_path_factory.mktemp("formed")
    with at_home(home, prefect_server, mlflow_server):
        make_pools("cpu")
        deploy("optimize")
        yield home


@pytest.fixture
def page(browser: Browser, home: Path) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.set_default_timeout(PATIENCE_MILLISECONDS)
    yield page
    page.close()


@pytest.fixture
def form(page: Page, prefect_server: str) -> Page:
    """The page behind the button "Run" of the deployment."""
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("optimize/optimize")
    page.goto(f"{prefect_server.removesuffix('/api')}/v2/deployments/deployment/{deployment.id}/run")
    page.get_by_label("name", exact=True).wait_for()
    return page


def fill(form: Page, **texts: str) -> None:
    for name, text in texts.items():
        form.get_by_label(re.compile(rf"^{name}( \(Optional\))?$")).fill(text)


def own_workload(form: Page) -> None:
    form.get_by_role("button", name="Select kind", exact=True).click()
    form.get_by_role("option", name="custom").click()
    fill(form, factory="tests.integration.small_workloads:Small")


def runs_so_far() -> int:
    with get_client(sync_client=True) as client:
        return len(client.read_flow_runs())


def test_every_field_is_there_by_its_own_name_with_help_default_and_choices(form: Page) -> None:
    for stage in (
        "DistillConfig",
        "PruneConfig",
        "QuantizeConfig",
        "PlanConfig",
        "GpuConfig",
        "ProfileConfig",
        "WorkersConfig",
    ):
        form.get_by_role("tab", name=stage).click()
    shown = {label.removesuffix(" (Optional)") for label in form.locator("label").all_inner_texts()}
    definitions = json.loads((ROOT / "tests/golden/optimize_schema.json").read_text())["definitions"]
    assert {name for model in definitions.values() for name in model.get("properties", {})} <= shown
    assert form.get_by_text("Non-inferiority margin in the metric's own units").first.is_visible()
    assert form.get_by_label("margin (Optional)", exact=True).input_value() == "0.01"
    form.get_by_role("button", name="Select kind", exact=True).click()
    kinds = OptimizeConfig.model_json_schema()["$defs"]["WorkloadConfig"]["properties"]["kind"]["enum"]
    assert form.get_by_role("option").all_inner_texts() == kinds


def test_a_wrong_value_is_refused_by_name_before_anything_runs(form: Page) -> None:
    before = runs_so_far()
    own_workload(form)
    fill(form, name="Not a Name")
    form.get_by_role("button", name="Submit").click()
    form.get_by_text("Validation failed for field 'config.name'").wait_for()
    assert runs_so_far() == before


def test_filled_by_clicks_it_runs_to_the_end_and_its_artifacts_are_there(
    form: Page, home: Path, mlflow_server: str
) -> None:
    own_workload(form)
    fill(form, name=NAME, latency_seconds="0.05", min_compression_ratio="0.1", margin="0.5")
    form.get_by_role("tab", name="QuantizeConfig").click()
    form.get_by_role("button", name="Submit").click()
    form.wait_for_url("**tab=Runs")
    prefect("worker", "start", "--pool", "cpu", "--run-once", MODELPRESS_CHECKOUT=str(ROOT))

    form.get_by_role("link", name=f"optimize-{NAME}").first.click()
    form.get_by_text("Completed").first.wait_for()
    form.get_by_role("tab", name="Artifacts").click()
    for artifact in ("stages", "report", "mlflow", "version"):
        form.get_by_text(f"{NAME}-{artifact}").first.wait_for()
    form.get_by_text(f"{NAME}-report").first.click()
    form.get_by_role("link", name=re.compile("^[0-9a-f]{8}$")).first.click()
    form.get_by_role("heading", name=NAME, exact=True).first.wait_for()

    entry = pointer.current(open_store(str(home / "store")), NAME, "champion")
    assert entry is not None
    version = MlflowClient(mlflow_server, mlflow_server).get_model_version_by_alias(NAME, "champion")
    assert version.tags["pack"] == entry.pack
