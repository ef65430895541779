"""The page on access names every setting, every scope, every metric and every field of the audit that there is."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from modelpress.access import SCOPES
from modelpress.store import open_store
from serving.access_settings import AccessSettings
from serving.keyring import Keyring, Sources
from serving.metrics import Metrics
from serving.repository import Repository
from serving.scopes import ACTIONS, NEEDS

PAGE = (Path(__file__).parents[2] / "docs" / "access.md").read_text()


def test_every_setting_is_named() -> None:
    named: set[str] = set()
    for first, others in re.findall(r"`MODELPRESS_SERVING_(\w+)`((?:, `_\w+`)*)", PAGE):
        named |= {first, *re.findall(r"`_(\w+)`", others)}
    assert {name.upper() for name in AccessSettings.model_fields} <= named


def test_every_scope_and_every_action_is_named() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    assert set(SCOPES) <= rows
    assert all(f"`{action}`" in PAGE for action in ACTIONS.values())
    assert all(f"`{path}`" in PAGE for path, needs in NEEDS.items() if needs is None)


def test_every_metric_is_named(tmp_path: Path) -> None:
    metrics = Metrics(Repository(open_store(str(tmp_path))), Keyring(Sources()), workers=1)
    metrics.answered("/metrics", None, 200, 0.1)
    named = set(re.findall(r"`(modelpress_\w+)`", PAGE))
    found = {family.name for family in text_string_to_metric_families(metrics.text().decode())}
    ours = {name for name in found if name.startswith("modelpress_")}
    assert len(ours) > 8
    assert {name.removesuffix("_total") for name in ours} == {
        name.removesuffix("_total") for name in named if name != "modelpress_test"
    }
