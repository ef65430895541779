"""The OpenAPI 3.1 document of all routes, built from one table; a test holds the table against the routes.

A part that adds a route adds its `Operation` to `OPERATIONS`, and its bodies to `SCHEMAS`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modelpress import __version__
from serving.scopes import NEEDS
from serving.tensors import DATATYPES

JSON = "application/json"
OCTETS = "application/octet-stream"
Schema = dict[str, Any]


@dataclass(frozen=True)
class Operation:
    """One method of one path."""

    method: str
    """In capitals."""
    path: str
    """With parameters in braces; each is one segment of text."""
    id: str
    """Name of the function in generated clients."""
    summary: str
    """One line."""
    answers: Mapping[int, str]
    """Name of the schema of the body, by status; errors that every route may give stand under `default`."""
    body: str | None = None
    """Name of the schema of the request's body."""
    body_required: bool = True
    binary: bool = False
    """Whether request and answer may carry binary tensor data behind their JSON."""
    parameters: list[Schema] = field(default_factory=list)
    """Headers and query parameters, as OpenAPI spells them."""
    media: str = JSON
    """Type of its answers that are no errors."""


def ref(name: str) -> Schema:
    """A reference to a schema of `SCHEMAS`."""
    return {"$ref": f"#/components/schemas/{name}"}


def _object(properties: Schema, required: list[str], **more: Any) -> Schema:
    return {"type": "object", "properties": properties, "required": required} | more


TEXT: Schema = {"type": "string"}
YES_NO: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
_DIGEST: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_TOKEN: Schema = {
    "type": "string",
    "pattern": "^[A-Za-z0-9_-]{8,64}$",
    "description": "Names the attempt, for a retry.",
}
_MAYBE: Schema = {"type": ["string", "null"]}
_SHAPE: Schema = {"type": "array", "items": {"type": "integer", "minimum": 1}, "maxItems": 32}
_DATA: Schema = {
    "type": "array",
    "description": "Row-major elements, flat or nested like the shape: numbers, booleans, or text for BYTES.",
}
_BINARY_SIZE: Schema = {
    "type": "object",
    "properties": {"binary_data_size": COUNT | {"description": "Bytes of this tensor behind the JSON."}},
}

SCHEMAS: dict[str, Schema] = {
    "Error": _object({"error": TEXT}, ["error"], additionalProperties=False),
    "Empty": {"type": "object"},
    "Text": TEXT,
    "Rollback": _object({"to": _DIGEST, "from": _DIGEST, "token": _TOKEN}, [], additionalProperties=False),
    "Promote": _object({"pack": _DIGEST, "from": _DIGEST, "token": _TOKEN}, ["pack"], additionalProperties=False),
    "Moved": _object(
        {"name": TEXT, "alias": TEXT, "pack": TEXT, "pointer": COUNT, "before": _MAYBE, "answers": _MAYBE},
        ["name", "alias", "pack", "pointer"],
    ),
    "Status": _object(
        {
            "you": {"type": "object"},
            "server": {"type": "object"},
            "store": {"type": "object"},
            "requests": {"type": "object"},
            "models": {"type": "array", "items": {"type": "object"}},
        },
        ["you", "server", "models"],
    ),
    "Server": _object(
        {"name": TEXT, "version": TEXT, "extensions": {"type": "array", "items": TEXT}},
        ["name", "version", "extensions"],
    ),
    "Live": _object({"live": YES_NO}, ["live"]),
    "Ready": _object(
        {"ready": YES_NO, "store": TEXT | {"description": "That the store does not answer, and since when."}}, ["ready"]
    ),
    "ModelReady": _object({"name": TEXT, "ready": YES_NO}, ["name", "ready"]),
    "Tensor": _object(
        {
            "name": TEXT,
            "datatype": {"enum": list(DATATYPES)},
            "shape": {"type": "array", "items": {"type": "integer", "minimum": -1}},
        },
        ["name", "datatype", "shape"],
    ),
    "Model": _object(
        {
            "name": TEXT,
            "versions": {"type": "array", "items": TEXT, "description": "Digests of the packs that answer."},
            "platform": TEXT,
            "inputs": {"type": "array", "items": ref("Tensor")},
            "outputs": {"type": "array", "items": ref("Tensor")},
            "parameters": _object(
                {
                    "pack": TEXT | {"description": "sha256 of the manifest of the pack that answers."},
                    "provider": TEXT,
                    "processed": TEXT | {"description": "Name of the model that takes texts or images."},
                    "golden": YES_NO | {"description": "Whether it was tested on golden samples of its own."},
                    "golden_difference": {"type": "number", "minimum": 0},
                    "golden_tolerance": {"type": "number", "minimum": 0},
                    "store": TEXT | {"description": "That the store does not answer, and since when."},
                    "batching": _object({"joined": YES_NO, "reason": TEXT}, ["joined", "reason"]),
                    "lineage": {"type": "object"},
                    "decision": {"type": "object", "description": "What the gate decided, where one did."},
                },
                ["pack"],
            ),
        },
        ["name", "versions", "platform", "inputs", "outputs", "parameters"],
    ),
    "InputTensor": _object(
        {
            "name": TEXT,
            "datatype": {"enum": list(DATATYPES)},
            "shape": _SHAPE,
            "data": _DATA,
            "parameters": _BINARY_SIZE,
        },
        ["name", "datatype", "shape"],
    ),
    "RequestedOutput": _object(
        {"name": TEXT, "parameters": {"type": "object", "properties": {"binary_data": YES_NO}}}, ["name"]
    ),
    "InferRequest": _object(
        {
            "id": TEXT,
            "inputs": {"type": "array", "items": ref("InputTensor"), "minItems": 1},
            "outputs": {"type": "array", "items": ref("RequestedOutput"), "minItems": 1},
            "parameters": {
                "type": "object",
                "properties": {
                    "binary_data_output": YES_NO,
                    "timeout": COUNT | {"description": "Microseconds after which the answer is of no use."},
                },
            },
        },
        ["inputs"],
    ),
    "OutputTensor": _object(
        {
            "name": TEXT,
            "datatype": {"enum": list(DATATYPES)},
            "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            "data": _DATA,
            "parameters": _BINARY_SIZE,
        },
        ["name", "datatype", "shape"],
    ),
    "InferAnswer": _object(
        {
            "model_name": TEXT,
            "model_version": TEXT | {"description": "Digest of the pack that answered."},
            "id": TEXT,
            "outputs": {"type": "array", "items": ref("OutputTensor")},
        },
        ["model_name", "model_version", "outputs"],
    ),
    "Nudge": _object({"name": TEXT, "alias": TEXT}, ["name", "alias"]),
    "Nudged": _object({"look": TEXT}, ["look"]),
    "IndexRequest": {"type": "object", "properties": {"ready": YES_NO}},
    "Index": {
        "type": "array",
        "items": _object(
            {
                "name": TEXT,
                "version": TEXT,
                "state": {"enum": ["READY", "UNAVAILABLE"]},
                "reason": TEXT,
                "held": YES_NO,
            },
            ["name", "state"],
        ),
    },
}

_TIMEOUT: Schema = {
    "name": "X-Request-Timeout",
    "in": "header",
    "description": "Milliseconds after which the answer is of no use: work that waits is dropped, and 504 comes back.",
    "schema": {"type": "integer", "minimum": 0, "maximum": 999_999_999_999},
}
_HEADER_LENGTH: Schema = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "description": "Length of the JSON, where binary tensor data stands behind it.",
    "schema": {"type": "integer", "minimum": 0, "maximum": 999_999_999_999},
}
_CANARY_KEY: Schema = {
    "name": "Modelpress-Canary-Key",
    "in": "header",
    "description": "While a canary runs, requests with the same key get the same model.",
    "schema": TEXT,
}


def _signed(name: str) -> Schema:
    return {"name": name, "in": "header", "required": True, "schema": TEXT}


_MODEL, _VERSION = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"


def _infer(path: str, name: str, summary: str) -> Operation:
    options: Any = {"body": "InferRequest", "binary": True, "parameters": [_TIMEOUT, _HEADER_LENGTH, _CANARY_KEY]}
    return Operation("POST", f"{path}/infer", name, summary, {200: "InferAnswer"}, **options)


OPERATIONS = [
    Operation("GET", "/v2", "server", "Name, version and extensions of the server", {200: "Server"}),
    Operation("GET", "/v2/openapi.json", "openapi", "This document", {200: "Empty"}),
    Operation("GET", "/v2/health/live", "live", "Whether the process works", {200: "Live", 503: "Live"}),
    Operation("GET", "/v2/health/ready", "ready", "Whether all models answer", {200: "Ready", 503: "Ready"}),
    Operation("GET", _MODEL, "model", "What a model takes and gives, and which pack answers", {200: "Model"}),
    Operation("GET", _VERSION, "model_version", "The same of one pack that is loaded", {200: "Model"}),
    Operation(
        "GET", f"{_MODEL}/ready", "model_ready", "Whether a model answers", {200: "ModelReady", 503: "ModelReady"}
    ),
    Operation(
        "GET",
        f"{_VERSION}/ready",
        "version_ready",
        "Whether one pack of a model answers",
        {200: "ModelReady", 503: "ModelReady"},
    ),
    _infer(_MODEL, "infer", "An answer by the pack that the pointer names"),
    _infer(_VERSION, "infer_version", "An answer by one pack that is loaded, by its digest or 12 of its first digits"),
    Operation(
        "POST",
        "/v2/repository/index",
        "index",
        "All models, and what is wrong with them",
        {200: "Index"},
        body="IndexRequest",
        body_required=False,
    ),
    Operation(
        "POST",
        "/v2/repository/models/{name}/load",
        "load",
        "Look at the pointer now, and load what it names",
        {200: "Empty"},
        body="Empty",
        body_required=False,
    ),
    Operation(
        "POST",
        "/v2/repository/models/{name}/unload",
        "unload",
        "Take a model out, until it is loaded again",
        {200: "Empty"},
        body="Empty",
        body_required=False,
    ),
    Operation(
        "POST",
        "/v2/repository/nudge",
        "nudge",
        "Look at a pointer now: signed, by whoever moved it",
        {202: "Nudged"},
        body="Nudge",
        parameters=[
            _signed(name) for name in ("X-Modelpress-Nudge", "X-Modelpress-Timestamp", "X-Modelpress-Signature")
        ],
    ),
    Operation(
        "POST",
        "/v2/repository/models/{name}/rollback",
        "rollback",
        "Move the pointer back to an earlier pack, where the operator allows it",
        {200: "Moved"},
        body="Rollback",
        body_required=False,
    ),
    Operation(
        "POST",
        "/v2/repository/models/{name}/promote",
        "promote",
        "Move the pointer to a pack that the gate let through, where the operator allows it",
        {200: "Moved"},
        body="Promote",
    ),
    Operation("GET", "/v2/status", "status", "Models, gates, canaries, latencies", {200: "Status"}),
    Operation("GET", "/status", "status_page", "The status page", {200: "Text"}, media="text/html"),
    Operation("GET", "/metrics", "metrics", "Counts and times for Prometheus", {200: "Text"}, media="text/plain"),
]
"""Every route."""


def document() -> Schema:
    """The OpenAPI document."""
    paths: dict[str, Schema] = {}
    for one in OPERATIONS:
        paths.setdefault(one.path, {})[one.method.lower()] = _operation(one)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "modelpress serving",
            "version": __version__,
            "description": "Open Inference Protocol v2 with binary tensor data and the model repository extension.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(one: Operation) -> Schema:
    answers: Schema = {
        str(status): {"description": _STATUS.get(status, "An answer"), "content": {one.media: {"schema": ref(name)}}}
        for status, name in one.answers.items()
    }
    if one.binary:
        answers["200"]["content"][OCTETS] = {"schema": {"type": "string", "format": "binary"}}
        answers["200"]["headers"] = {
            "Modelpress-Pack": {"description": "Digest of the pack that answered.", "schema": TEXT}
        }
    answers["default"] = {"description": "What is wrong", "content": {JSON: {"schema": ref("Error")}}}
    needs = NEEDS[one.path]
    names = re.findall(r"{(\w+)}", one.path)
    places = [{"name": name, "in": "path", "required": True, "schema": TEXT} for name in names]
    found: Schema = {
        "operationId": one.id,
        "summary": one.summary,
        "parameters": places + one.parameters,
        "responses": answers,
        # A server without keys asks for none; which keys open a door, `serving.scopes` says.
        "security": [] if needs is None else [{}, {"bearer": list(needs)}],
    }
    if one.body is not None:
        content: Schema = {JSON: {"schema": ref(one.body)}}
        if one.binary:
            content[OCTETS] = {"schema": {"type": "string", "format": "binary"}}
        found["requestBody"] = {"required": one.body_required, "content": content}
    return found


_STATUS = {200: "Done", 202: "Taken", 503: "Not now"}
