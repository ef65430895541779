"""Kubernetes' schemas, each read from the disk once: the package reads megabytes anew for every manifest."""

from __future__ import annotations

import functools
from typing import Any

import jsonschema
import kubernetes_validate
from kubernetes_validate import utils

OLDEST, NEWEST = "1.30", kubernetes_validate.latest_version()
"""Of Kubernetes: the oldest that the manifests are for, and the newest that the package knows."""

_WORDS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_DURATION = {"type": "string", "pattern": "^([0-9]+h)?([0-9]+m)?([0-9]+s)?$"}
CERTIFICATE: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "cert-manager.io/v1"},
        "kind": {"const": "Certificate"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["secretName", "issuerRef"],
            "properties": {
                "secretName": {"type": "string"},
                "duration": _DURATION,
                "renewBefore": _DURATION,
                "dnsNames": _WORDS,
                "usages": {
                    "type": "array",
                    "items": {"enum": ["digital signature", "key encipherment", "server auth"]},
                },
                "privateKey": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "algorithm": {"enum": ["RSA", "ECDSA", "Ed25519"]},
                        "encoding": {"enum": ["PKCS1", "PKCS8"]},
                        "rotationPolicy": {"enum": ["Never", "Always"]},
                        "size": {"type": "integer"},
                    },
                },
                "issuerRef": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["name"],
                    "properties": {name: {"type": "string"} for name in ("name", "kind", "group")},
                },
            },
        },
    },
}
"""The fields of cert-manager's Certificate that a server needs, as its custom resource definition (v1) has them;
Kubernetes' own schemas have none of it."""

utils.schema_contents = functools.cache(utils.schema_contents)


def check(manifest: dict[str, Any], version: str) -> None:
    """Refuse what Kubernetes would, and what it would drop.

    Raises:
        kubernetes_validate.ValidationError, jsonschema.ValidationError: it says where and what.
    """
    if manifest["apiVersion"].startswith("cert-manager.io/"):
        jsonschema.validate(manifest, CERTIFICATE)
        return
    kubernetes_validate.validate(manifest, version, strict=True)
