"""Kubernetes' schemas, each read from the disk once: the package reads megabytes anew for every manifest."""

from __future__ import annotations

import functools
from typing import Any

import kubernetes_validate
from kubernetes_validate import utils

OLDEST, NEWEST = "1.30", kubernetes_validate.latest_version()
"""Of Kubernetes: the oldest that the manifests are for, and the newest that the package knows."""

utils.schema_contents = functools.cache(utils.schema_contents)


def check(manifest: dict[str, Any], version: str) -> None:
    """Refuse what Kubernetes would, and what it would drop.

    Raises:
        kubernetes_validate.ValidationError: it says where and what.
    """
    kubernetes_validate.validate(manifest, version, strict=True)
