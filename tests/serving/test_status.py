"""What the status says, to whom, and what the page may do."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from modelpress import pointer
from modelpress.errors import StoreUnavailableError
from modelpress.store import Store
from serving.audit import Audit
from serving.keyring import Keyring, Sources
from serving.main import ServingSettings, application
from serving.repository import Repository
from serving.status import gate_of
from tests.serving.conftest import scale_model

Call = Callable[..., Any]
DECISION = {
    "promote": True,
    "verdict": "pass",
    "checks": [{"name": "quality", "verdict": "pass", "reason": "0.98 against 0.97", "required_samples": None}],
}


def client_of(repository: Repository) -> TestClient:
    settings = ServingSettings(poll_seconds=0, workers=1)
    return TestClient(application(repository, settings, Keyring(Sources()), Audit()))


def test_it_says_what_answers_and_why_it_may(store: Store, press: Call, repository: Call) -> None:
    pack = press(scale_model(2.0), alias=None)
    pointer.append(store, "scale", "champion", pack, "promote", DECISION, by="anna (key 1)")
    press(scale_model(3.0), "other")
    found = client_of(repository()).get("/v2/status").json()
    assert (found["server"]["ready"], found["server"]["rollback"], found["store"]["reachable"]) == (True, False, True)
    assert found["you"] == {"name": "anonymous", "scopes": ["metrics"]}, "nobody moves a pointer without a key"
    other, scale = found["models"]
    assert other["gate"] is None
    assert (scale["state"], scale["pack"], scale["pointer"], scale["behind"]) == ("READY", pack, 1, 0)
    assert scale["moved"]["who"].startswith("anna (key 1) by ")
    assert scale["gate"] == {
        "verdict": "pass",
        "checks": [{"name": "quality", "verdict": "pass", "reason": "0.98 against 0.97"}],
    }
    assert scale["latency"]["samples"] == 0


def test_a_store_that_is_away_is_said_and_no_place_of_it(
    press: Call, repository: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    press(scale_model(2.0))
    models = repository("scale")
    client = client_of(models)

    def silent(*_: object) -> None:
        raise StoreUnavailableError("reading file:///secret/place")

    with monkeypatch.context() as patched:
        patched.setattr(pointer, "current", silent)
        models.poll()
    answer = client.get("/v2/status")
    found = answer.json()
    assert (found["store"]["reachable"], datetime.fromisoformat(found["store"]["since"]).tzinfo) == (False, UTC)
    assert "modelpress_store_answers 0.0" in client.get("/metrics").text
    assert (found["models"][0]["state"], found["models"][0]["behind"]) == ("READY", None), "unknown is not none"
    assert "does not answer" in found["models"][0]["reason"]
    assert "/secret" not in answer.text
    models.poll()
    assert client.get("/v2/status").json()["store"] == {"reachable": True, "since": None}
    assert "modelpress_store_answers 1.0" in client.get("/metrics").text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["verdict", "checks", "x"]), inner),
    max_leaves=12,
)


@given(JSON)
def test_a_decision_of_any_shape_is_shown_as_text(decision: Any) -> None:
    found = gate_of(decision)
    if found is not None:
        assert isinstance(found["verdict"], str)
        assert all(isinstance(value, str) for check in found["checks"] for value in check.values())


def test_the_page_holds_no_data_and_may_do_nothing_else(press: Call, repository: Call) -> None:
    press(scale_model(2.0), "secretive")
    answer = client_of(repository()).get("/status")
    assert "secretive" not in answer.text
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy["script-src"])
    assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy["style-src"])
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "style=", "Storage"):
        assert way not in answer.text, way
    assert not re.search(r"<[^>]* on[a-z]+=", answer.text), "a handler within an element"
    assert not re.search(r"https?://", answer.text), "nothing is fetched from elsewhere"
