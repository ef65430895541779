"""The OpenAPI document is true of the routes, and the routes keep what it promises."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from starlette.routing import Route
from starlette.testclient import TestClient

from modelpress.store import open_store
from serving import openapi
from serving.audit import Audit
from serving.keyring import Keyring, Sources
from serving.main import ServingSettings, application
from serving.repository import Repository
from serving.scopes import NEEDS
from tests.serving.conftest import lookup_model, publish_pack, scale_model

EXAMPLES = 12
BEHIND: list[Any] = []
"""The application, once there is one: tests of operations are collected before."""


async def relay(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "lifespan":
        await BEHIND[-1](scope, receive, send)
        return
    for step in ("startup", "shutdown"):  # of each call: the application has one life
        await receive()
        await send({"type": f"lifespan.{step}.complete"})


def about_models() -> dict[str, Any]:
    """The document, with names of models that are there: or no request would come as far as a model."""
    found = openapi.document()
    for path in found["paths"].values():
        for operation in path.values():
            for parameter in operation["parameters"]:
                if (parameter["name"], parameter["in"]) == ("name", "path"):
                    parameter["schema"] = {"enum": ["scale", "lookup"]}
    return found


schema = schemathesis.openapi.from_dict(about_models())
schema.app = relay


@pytest.fixture(scope="module", autouse=True)
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two models on a store, for as long as the module's tests take."""
    store = open_store(str(tmp_path_factory.mktemp("store")))
    publish_pack(store, tmp_path_factory.mktemp("scale"), scale_model(2.0), "scale")
    publish_pack(store, tmp_path_factory.mktemp("lookup"), lookup_model(), "lookup")
    repository = Repository(store, threads=1)
    repository.start()
    keyring, audit = Keyring(Sources()), Audit(tmp_path_factory.mktemp("audit") / "audit.jsonl")
    BEHIND.append(application(repository, ServingSettings(poll_seconds=0, workers=2), keyring, audit))
    yield BEHIND[-1]
    audit.close()


def test_the_table_and_the_routes_are_the_same(app: Any) -> None:
    routes = {
        (method, route.path)
        for route in app._app.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    table = [(one.method, one.path) for one in openapi.OPERATIONS]
    assert len(table) == len(set(table))
    assert set(table) == routes
    assert {path for _, path in table} == set(NEEDS)


def test_the_document_is_openapi_and_names_nothing_that_is_not_there() -> None:
    found = openapi.document()
    assert found["openapi"] == "3.1.0"
    for schema in found["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    named = set(re.findall(r"#/components/schemas/(\w+)", repr(found)))
    assert named == set(found["components"]["schemas"])
    ids = [one.id for one in openapi.OPERATIONS]
    assert len(ids) == len(set(ids))


def test_the_document_is_served(app: Any) -> None:
    assert TestClient(app).get("/v2/openapi.json").json() == openapi.document()


# With a parameter of pytest's own, or pytest (9.2) gives all routes one id, of which pytest-xdist runs one.
@schema.exclude(path_regex="/unload$").parametrize()
@pytest.mark.parametrize("asked", ["at random"])
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_route_keeps_its_promises(case: Any, asked: str) -> None:
    """Requests made from the document, right ones and wrong ones: no 5xx, and answers of the type that it states.

    A right request by the document may still not fit a model's shapes, so that it is refused.
    """
    case.call_and_validate(excluded_checks=[schemathesis.checks.positive_data_acceptance])
