"""All registered models, their versions and aliases, read for a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TypeVar

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.store.entities import PagedList

from modelpress.page.registry import Registry, Version
from registry import promotion, reconcile, versions

PAGE = 500
"""Models, or versions, of one answer."""
OURS = (
    *("lineage", "gate.", "figures.", "undone.", "attribution_", "evaluated.", "mlflow"),
    *(versions.TAG_PACK, versions.TAG_URI, versions.TAG_LOGGED, versions.TAG_VERSION),
    *("flow_run_", "report_uri", "compression_ratio", "speedup", "throughput_", "source_throughput_"),
)
"""Beginnings of the tags that are told in another way, or are for programs."""
NO_STAGE = (None, "", "None")
_ABSENT = tuple(ErrorCode.Name(code) for code in (RESOURCE_DOES_NOT_EXIST, INVALID_PARAMETER_VALUE))
EntityT = TypeVar("EntityT")


def read(client: MlflowClient, address: str, names: Sequence[str] = (), *, page: int = PAGE) -> Registry:
    """Read the registry; a request for each `page` models and for each `page` versions.

    Args:
        client: MLflow.
        address: of the registry, for people.
        names: these models alone, those that there are; empty takes all.
        page: entities of one answer.

    Raises:
        MlflowException: MLflow does not answer, or refuses; see `runs.named_errors`.
    """
    models = {model.name: model for model in _models(client, names, page)}
    found: dict[tuple[str, str], Version] = {}
    for one in _versions(client, sorted(models) if names else None, page):  # one that is made meanwhile may come twice
        found.setdefault((one.name, str(one.version)), _version(one))
    return Registry(
        address=address,
        models=sorted(models),
        versions=sorted(found.values(), key=lambda one: (one.name, -int(one.number))),
        aliases={
            (name, alias): str(number) for name, model in models.items() for alias, number in model.aliases.items()
        },
    )


def _models(client: MlflowClient, names: Sequence[str], page: int) -> Iterator[RegisteredModel]:
    if not names:
        yield from _paged(lambda token: client.search_registered_models(max_results=page, page_token=token))
    for name in names:
        try:
            yield client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code not in _ABSENT:
                raise


def _versions(client: MlflowClient, names: Sequence[str] | None, page: int) -> Iterator[ModelVersion]:
    order = ["name ASC", "version_number DESC"]  # not by when they changed, as MLflow would: they change meanwhile
    queries = [_named(name) for name in names] if names is not None else [None]
    for query in queries:

        def ask(token: str | None, query: str | None = query) -> PagedList[ModelVersion]:
            return client.search_model_versions(query, max_results=page, order_by=order, page_token=token)

        yield from _paged(ask)


def _named(name: str) -> str:
    quote = '"' if "'" in name else "'"
    return f"name = {quote}{name}{quote}"


def _paged(ask: Callable[[str | None], PagedList[EntityT]]) -> Iterator[EntityT]:
    token: str | None = None
    while True:
        answer = ask(token)
        yield from answer
        token = answer.token
        if not token:
            return


def _version(found: ModelVersion) -> Version:
    tags: dict[str, str] = {key: str(value) for key, value in found.tags.items()}
    notes = [f"overridden: {tags[promotion.TAG_OVERRIDE]}"] if promotion.TAG_OVERRIDE in tags else []
    undone = f"{reconcile.TAG_UNDONE}.why"
    notes += [f"taken back: {tags[undone]}"] if undone in tags else []
    stage = {"stage": found.current_stage} if found.current_stage not in NO_STAGE else {}
    return Version(
        name=found.name,
        number=str(found.version),
        pack=tags.get(versions.TAG_PACK, ""),
        uri=tags.get(versions.TAG_URI, ""),
        created=datetime.fromtimestamp(found.creation_timestamp / 1000, UTC),
        verdict=tags.get("gate.verdict", ""),
        notes=notes,
        compression_ratio=_number(tags.get("compression_ratio")),
        speedup=_number(tags.get("speedup")),
        tags={key: value for key, value in tags.items() if not key.startswith(OURS)} | stage,
    )


def _number(text: str | None) -> float | None:
    """A tag as a number; anybody may write a tag, and one that is none counts as not measured."""
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None
