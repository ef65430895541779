"""What lies under `packs/`: manifests, signatures and pointers, each read and checked."""

from __future__ import annotations

from dataclasses import dataclass, field

from modelpress import decisions, keys, load, pointer, run_records
from modelpress.errors import FormatError, KeyRefusedError, NotFoundError, TrustError, UnsignedError
from modelpress.keys import Place
from modelpress.reports.scrub import Finding, PackRow
from modelpress.store.base import Store
from modelpress.trust.packs import read_signature


@dataclass
class Survey:
    """What was found, and what blobs there should be."""

    packs: list[PackRow] = field(default_factory=list)
    wanted: dict[str, tuple[int, Place]] = field(default_factory=dict)
    """Digest of each blob that a manifest lists: its length, and one pack that has it."""
    aliases: dict[tuple[str, str], None] = field(default_factory=dict)
    """Name and alias of each pointer."""
    signatures: int = 0
    decisions: int = 0
    decided: set[tuple[str, str]] = field(default_factory=set)
    """Name and digest of each decision."""
    followed: dict[tuple[str, str], str] = field(default_factory=dict)
    """Name and digest of each that another one names as before it, and the key of that."""
    runs: int = 0
    findings: list[Finding] = field(default_factory=list)


def survey(store: Store) -> Survey:
    """Read everything under `packs/`.

    Raises:
        StoreError: the store does not answer.
    """
    found = Survey()
    signed: list[Place] = []
    for info in store.list(keys.PACKS):
        place = keys.place(info.key)
        if place is None:
            problem = "publishing, signing and promoting write no such object"
            found.findings.append(Finding(kind="foreign", key=info.key, pack="", problem=problem))
        elif place.kind == "manifest":
            _manifest(store, place, found)
        elif place.kind == "signature":
            signed.append(place)
        elif place.kind == "pointer":
            found.aliases[place.name, place.alias] = None
        elif place.kind == "decision":
            _decision(store, place, found)
        elif place.kind == "run":
            _run(store, place, found)
    _chained(found)
    there = {(row.name, row.digest) for row in found.packs}
    for place in signed:
        _signature(store, place, (place.name, place.digest) in there, found)
    for name, alias in found.aliases:
        _pointer(store, name, alias, found)
    return found


def of(place: Place) -> str:
    """How a pack is called in a finding."""
    return f"{place.name}@{place.digest[:12]}"


def _manifest(store: Store, place: Place, found: Survey) -> None:
    key = keys.manifest(place.name, place.digest)
    try:
        manifest = load.load_manifest(store.held_to(None), place.name, place.digest)
    except NotFoundError:  # deleted since it was listed
        return
    except FormatError as error:
        found.findings.append(Finding(kind="damaged", key=key, pack=of(place), problem=_told(error)))
        return
    vouched = "not asked for"
    try:
        if store.trust is not None:
            vouched = ", ".join(one.line() for one in load.check_trust(store, place.name, place.digest))
    except NotFoundError:  # deleted since it was read
        return
    except TrustError as error:
        vouched = "nobody"
        found.findings.append(Finding(kind="untrusted", key=key, pack=of(place), problem=_told(error)))
    blobs = manifest.blobs()
    for digest, size in blobs.items():
        found.wanted.setdefault(digest, (size, place))
    found.packs.append(
        PackRow(
            name=place.name, digest=place.digest, blobs=len(blobs), blob_bytes=sum(blobs.values()), signed_by=vouched
        )
    )


def _signature(store: Store, place: Place, has_pack: bool, found: Survey) -> None:
    """One signature; that of a key that does not count any more is in order."""
    policy = store.trust.policy() if store.trust else None
    signed = read_signature(store, policy, place.name, place.digest, place.key_id)
    if signed is None:
        return
    found.signatures += 1
    key = keys.signature(place.name, place.digest, place.key_id)
    if signed.problem is not None and not isinstance(signed.problem, KeyRefusedError):
        problem = _told(signed.problem)
        found.findings.append(Finding(kind="damaged", key=key, pack=of(place), problem=problem))
    elif not has_pack and store.info(keys.manifest(place.name, place.digest)) is None:
        problem = "the manifest that it signs is not there"
        found.findings.append(Finding(kind="unreferenced", key=key, pack=of(place), problem=problem))


def _decision(store: Store, place: Place, found: Survey) -> None:
    """What a gate decided. One that nobody signed, or by a key that does not count any more, is in order: nothing is
    served by it."""
    key = keys.decision(place.name, place.digest, place.record)
    found.decided.add((place.name, place.record))
    try:
        record = decisions.read(store, place.name, place.digest, place.record)
        found.followed |= {(place.name, one): key for one in record.before or ()}
    except NotFoundError:  # deleted since it was listed
        return
    except (UnsignedError, KeyRefusedError):
        pass
    except (FormatError, TrustError) as error:
        found.findings.append(Finding(kind="damaged", key=key, pack=of(place), problem=_told(error)))
        return
    found.decisions += 1


def _chained(found: Survey) -> None:
    """That each decision is there which another one came after."""
    for (name, digest), key in sorted(found.followed.items()):
        if (name, digest) not in found.decided:
            lost = f"no such decision, and {key} came after it"
            place = f"{keys.decisions(name)}*/{digest}.json"
            found.findings.append(Finding(kind="missing", key=place, pack=name, problem=lost))


def _run(store: Store, place: Place, found: Survey) -> None:
    """What a run did, and its page. One that nobody signed is in order: nothing is served by it."""
    key = keys.run(place.name, place.digest, place.record)
    try:
        record = run_records.read_unasked(store, place.name, place.digest, place.record)
        if record.page is not None:
            run_records.check_page(store, record)
    except NotFoundError as error:
        if store.info(key) is not None:  # else it was deleted since it was listed
            finding = Finding(kind="missing", key=key, pack=of(place), problem=f"its page is not there: {error.found}")
            found.findings.append(finding)
        return
    except FormatError as error:
        found.findings.append(Finding(kind="damaged", key=key, pack=of(place), problem=_told(error)))
        return
    found.runs += 1


def _pointer(store: Store, name: str, alias: str, found: Survey) -> None:
    """A whole log, and that its newest entry leads to a pack."""
    try:
        entries = pointer.history(store, name, alias)
    except TrustError as error:
        key = keys.pointers(name, alias)
        found.findings.append(Finding(kind="untrusted", key=key, pack=f"{name}@{alias}", problem=_told(error)))
        return
    except FormatError as error:
        key = keys.pointers(name, alias)
        found.findings.append(Finding(kind="damaged", key=key, pack=f"{name}@{alias}", problem=_told(error)))
        return
    _kept_decisions(store, name, alias, entries, found)
    if entries and store.info(keys.manifest(name, entries[-1].pack)) is None:
        key = keys.manifest(name, entries[-1].pack)
        lost = f"no such manifest, and entry {entries[-1].number} of {name}@{alias} points at it"
        found.findings.append(Finding(kind="missing", key=key, pack=f"{name}@{alias}", problem=lost))


def _kept_decisions(store: Store, name: str, alias: str, entries: list[pointer.Pointer], found: Survey) -> None:
    """That each decision that an entry names is there; whether it is in order is seen where it is listed."""
    for entry in entries:
        record = decisions.named_by(entry)
        if record is None:
            continue
        key = keys.decision(name, entry.pack, record)
        if store.info(key) is None:
            lost = f"no such decision, and entry {entry.number} of {name}@{alias} rests on it"
            found.findings.append(Finding(kind="missing", key=key, pack=f"{name}@{alias}", problem=lost))


def _told(error: FormatError | TrustError) -> str:
    text = f"{error.doing}: found {error.found}" if error.found else error.doing
    return f"{text}, expected {error.expected}" if error.expected else text
