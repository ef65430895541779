"""Registered model versions: one per published pack, with the pack's identity in its tags.

MLflow is the index for people; the bytes, and the pointer that servers follow, are in the store. What a version has for
its source is a logged model of a few kilobytes, by which MLflow loads the pack from there (`registry/loadable.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, RESOURCE_DOES_NOT_EXIST, ErrorCode

from modelpress import keys, pointer
from modelpress.errors import CorruptionError, NotFoundError
from modelpress.store.base import Store

TAG_PACK = "pack"
TAG_URI = "pack_uri"
TAG_LOGGED = "logged_model"
TAG_VERSION = "model_version"
TAG_GATE_ALIAS = "gate.alias"
"""The alias that was at stake when the version was judged last."""
FOLLOWED = "pointer."
"""Beginning of a registered model's tags, one for each alias: number of the pointer's entry that MLflow's alias was
known to follow last."""
MAX_DESCRIPTION = 5000
"""Characters that MLflow takes."""
MAX_TAG = 1000
"""Characters of a tag's value that are worth keeping; MLflow takes more."""
NOTES = "\n\n---\n"
"""Between a version's description and the notes under it."""
SHORTEST_DIGEST = 12
"""Digits: a shorter number is a version's."""


@dataclass(frozen=True)
class Version:
    """One registered version."""

    name: str
    number: str
    pack: str
    """Digest of its pack."""
    uri: str
    """Where the pack's manifest lies."""
    run_id: str
    tags: Mapping[str, str] = field(default_factory=dict)


def register(
    client: MlflowClient,
    name: str,
    *,
    pack: str,
    uri: str,
    run_id: str,
    tags: Mapping[str, str],
    measured: Mapping[str, str],
    description: str,
    log: Callable[[], LoggedModel],
) -> tuple[Version, bool]:
    """The version that carries a pack; made if there is none. True: it was made now.

    Of a version that is there already, `tags` stay, and the `measured` ones become today's: the gate reads them. For a
    new one `log` logs the model that MLflow loads by it.
    """
    found = find(client, name, pack)
    if found is not None:
        annotate(client, found, {key: value for key, value in measured.items() if found.tags.get(key) != value})
        return replace(found, tags={**found.tags, **measured}), False
    try:
        client.create_registered_model(name, description="Packs published by modelpress.")
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
    model = log()
    created = client.create_model_version(
        name,
        # Not models:/ID, which MLflow looks up in the database of the process, not in this client's.
        source=model.artifact_location,
        run_id=run_id,
        tags={TAG_PACK: pack, TAG_URI: uri, TAG_LOGGED: model.model_id, **tags, **measured},
        description=description,
        await_creation_for=0,
        model_id=model.model_id,
    )
    client.set_logged_model_tags(model.model_id, {TAG_VERSION: f"{name}/{created.version}"})
    return _version(created), True


def find(client: MlflowClient, name: str, pack: str) -> Version | None:
    """The version that carries a pack: the lowest, should two runs have registered it at the same time."""
    found = client.search_model_versions(f"name = '{name}' and tags.{TAG_PACK} = '{pack}'")
    return _version(min(found, key=lambda version: int(version.version))) if found else None


def carrying(client: MlflowClient, name: str, pack: str) -> Version:
    """The version that carries a pack.

    Raises:
        NotFoundError: none does.
    """
    version = find(client, name, pack)
    if version is None:
        raise NotFoundError(
            f"looking up the model version of pack {pack}",
            found=f"no version of {name!r} carries it",
            fix="run the optimize flow again with this config: it reuses what is published and registers it",
        )
    return version


def by_alias(client: MlflowClient, name: str, alias: str) -> Version | None:
    """The version that an alias names."""
    try:
        return _version(client.get_model_version_by_alias(name, alias))
    except MlflowException as error:
        # MLflow calls a missing alias INVALID_PARAMETER_VALUE; its text alone tells it from others.
        missing_alias = "alias" in str(error) and "not found" in str(error)
        if missing_alias or error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            return None
        raise


def by_number(client: MlflowClient, name: str, number: str) -> Version:
    """One version by its number.

    Raises:
        NotFoundError: there is none.
    """
    try:
        return _version(client.get_model_version(name, number))
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        raise NotFoundError(f"looking up version {number} of model {name!r}", found="no such version") from error


def resolve(client: MlflowClient, store: Store, name: str, text: str) -> str:
    """Digest of the pack that a version number, an alias, or a digest (or its beginning) names.

    An alias that has a pointer in the store is what the pointer says; MLflow is asked for the others.

    Raises:
        NotFoundError: nothing is called so.
    """
    if text.isdigit() and len(text) < SHORTEST_DIGEST:
        return by_number(client, name, text).pack
    if keys.is_alias(text):
        entry = pointer.current(store, name, text)
        if entry is not None:
            return entry.pack
        version = by_alias(client, name, text)
        if version is not None:
            return version.pack
    from modelpress import load  # pulls in torch, which the forms do without

    return load.resolve(store, name, text)


def set_alias(client: MlflowClient, version: Version, alias: str) -> None:
    """Let an alias name a version."""
    client.set_registered_model_alias(version.name, alias, version.number)


def annotate(client: MlflowClient, version: Version, tags: Mapping[str, str]) -> None:
    """Set tags of a version."""
    for key, value in tags.items():
        client.set_model_version_tag(version.name, version.number, key, value)


def note(client: MlflowClient, version: Version, text: str) -> None:
    """Write a line under the description of a version; the oldest such lines go where MLflow takes no more."""
    before = client.get_model_version(version.name, version.number).description or ""
    body, _, lines = before.partition(NOTES)
    kept = [*(line for line in lines.split("\n") if line), f"- {text}"[: MAX_DESCRIPTION // 2]]
    while len(kept) > 1 and len(body) + len(NOTES) + len("\n".join(kept)) > MAX_DESCRIPTION:
        kept.pop(0)
    room = MAX_DESCRIPTION - len(NOTES) - len("\n".join(kept))
    client.update_model_version(version.name, version.number, body[:room] + NOTES + "\n".join(kept))


def note_followed(client: MlflowClient, entry: pointer.Pointer) -> None:
    """Remember that MLflow's alias says what this entry says: what it says later, other than this, a person set."""
    client.set_registered_model_tag(entry.name, FOLLOWED + entry.alias, str(entry.number))


def follow_pointer(store: Store, client: MlflowClient, name: str, alias: str) -> None:
    """Let MLflow's alias say what the pointer says.

    Raises:
        NotFoundError: no version carries the pack.
    """
    entry = pointer.current(store, name, alias)
    if entry is None:
        client.delete_registered_model_alias(name, alias)
    else:
        set_alias(client, carrying(client, name, entry.pack), alias)
        note_followed(client, entry)


def measured_number(version: Version, key: str) -> float | None:
    """A measured tag as a number; None where the version has no such tag.

    Raises:
        CorruptionError: it is no number.
    """
    text = version.tags.get(key)
    try:
        return float(text) if text is not None else None
    except ValueError as error:
        raise CorruptionError(
            f"reading tag {key!r} of version {version.number} of model {version.name!r} in MLflow",
            found=repr(text),
            expected="a number",
            fix="run the optimize flow again with this recipe: it measures, and writes the tag anew",
        ) from error


def _version(found: ModelVersion) -> Version:
    tags: dict[str, Any] = dict(found.tags)
    return Version(
        found.name, str(found.version), tags.get(TAG_PACK, ""), tags.get(TAG_URI, ""), found.run_id or "", tags
    )
