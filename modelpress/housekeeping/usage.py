"""What takes how much room: by version, with what versions share, and what no version has."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime

from modelpress import keys, pointer
from modelpress.errors import NotFoundError
from modelpress.housekeeping.survey import PackEntry, PackId, Survey
from modelpress.reports import Counted, UsageReport, VersionUsage
from modelpress.store.base import Store


def usage(store: Store, name: str | None = None) -> UsageReport:
    """Read all manifests and list all objects; `name` restricts what is shown, not what is counted as shared.

    Raises:
        NotFoundError: no version of this name.
        CorruptionError: a manifest or an alias's log is damaged.
        UnsupportedFormatError: one was written by a newer modelpress.
        StoreError: see `modelpress.store.Store`.
    """
    survey = Survey()
    survey.look(store, datetime.now(UTC))
    if name is not None and all(pack.name != name for pack in survey.packs):
        known = ", ".join(sorted({pack.name for pack in survey.packs})) or "none"
        raise NotFoundError(f"measuring {name}", found=f"no such pack in {store.uri}; there are: {known}")
    users: dict[str, list[PackId]] = defaultdict(list)
    for pack, entry in sorted(survey.packs.items()):
        for digest in entry.blobs:
            users[digest].append(pack)
    there: dict[str, int] = {}
    sums = {"referenced": [0, 0], "unreferenced": [0, 0], "other": [0, 0]}
    for info in store.list():
        found = keys.blob_digest(info.key)
        if found is not None:
            there[found] = info.size_bytes
        kind = "other" if found is None else "referenced" if found in users else "unreferenced"
        sums[kind][0] += 1
        sums[kind][1] += info.size_bytes
    shown = [entry for pack, entry in survey.packs.items() if name in (None, pack.name)]
    shown.sort(key=lambda one: one.modified, reverse=True)
    shown.sort(key=lambda one: one.pack.name)
    aliases = _aliases(store, {entry.pack.name for entry in shown})
    return UsageReport(
        store=store.uri,
        versions=[_version(entry, users, there, aliases) for entry in shown],
        names=_by_name(shown),
        total_bytes=sum(size for _, size in sums.values()),
        **{kind: Counted(objects=objects, size_bytes=size) for kind, (objects, size) in sums.items()},
    )


def _version(
    entry: PackEntry, users: dict[str, list[PackId]], there: dict[str, int], aliases: dict[PackId, list[str]]
) -> VersionUsage:
    shared = {digest: size for digest, size in entry.blobs.items() if len(users[digest]) > 1}
    others = {other for digest in shared for other in users[digest]} - {entry.pack}
    return VersionUsage(
        name=entry.pack.name,
        pack=entry.pack.digest,
        modified=entry.modified,
        aliases=aliases.get(entry.pack, []),
        total_bytes=entry.size_bytes,
        alone_bytes=entry.size_bytes - sum(shared.values()),
        shared_bytes=sum(shared.values()),
        shared_with=[str(other) for other in sorted(others)],
        missing_bytes=sum(size for digest, size in entry.blobs.items() if there.get(digest) != size),
    )


def _by_name(shown: list[PackEntry]) -> dict[str, int]:
    blobs: dict[str, dict[str, int]] = defaultdict(dict)
    manifests: dict[str, int] = defaultdict(int)
    for entry in shown:
        blobs[entry.pack.name].update(entry.blobs)
        manifests[entry.pack.name] += entry.manifest_bytes
    return {name: sum(found.values()) + manifests[name] for name, found in blobs.items()}


def _aliases(store: Store, names: set[str]) -> dict[PackId, list[str]]:
    found: dict[PackId, list[str]] = defaultdict(list)
    for name in sorted(names):
        for alias in store.folders(f"{keys.manifests(name)}refs/"):
            if (entry := pointer.current(store, name, alias)) is not None:
                found[PackId(name, entry.pack)].append(alias)
    return found
