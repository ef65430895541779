"""What people do to aliases in MLflow by hand, brought together with the pointers that servers follow.

Setting an alias is how a person asks MLflow for a promotion. MLflow tells nobody who asked, and its events come late,
twice or not at all. So an event is a hint to look, never a command: what is done follows from what stands now, in three
places. The pointer's newest entry says what is served. MLflow's alias says what people see. A tag of the registered
model (`versions.FOLLOWED`) says which entry MLflow was known to follow last, and tells a person's wish from an alias
that lags behind:

==============================================  ====================================================================
what stands                                     what is done
==============================================  ====================================================================
alias and pointer name the same pack            nothing; the tag is brought up to date
no alias, no pointer                            nothing
the alias is gone, the pointer is there         the alias is set again: out of service goes nothing by a click
the alias names a pack of an entry between      MLflow lags (a rollback while it was down): the alias is set
the one it followed and the newest
the alias names another pack                    a person's wish: judged by the pack's own gate against what is served
… which passes                                  the pointer moves, on the condition that nobody moved it meanwhile
… which passes, and its gate asks for approval  the alias goes back, and a person is asked
… which fails, or is inconclusive               the alias goes back to the pointer's version (or goes, where there is
                                                no pointer), and the version says when and why
the alias names a version without a pack, or    the same
of one that is damaged, gone or not vouched for
the alias is a canary's                         the same: a canary begins with `modelpress promote --canary`
no version carries the pointer's pack           nothing can follow: told each time, until the pack is registered again
==============================================  ====================================================================

Whatever moves in between (a second click, a rollback, another reconciliation) is found by looking again, right before
anything is written, and it starts anew. MLflow has no conditional write for aliases: a click within the milliseconds
between that look and setting the alias back is lost, and the pointer stays what it was.

Watched are `champion`, aliases with a log in the store, and those that the version's last judgement was about. All
others belong to who set them, and so do models without packs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from mlflow import MlflowClient
from mlflow.entities.model_registry import RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

from modelpress import keys, pointer
from modelpress.canary.log import of_canaries
from modelpress.config import GateConfig
from modelpress.errors import ConflictError, FormatError, NotFoundError, TrustError
from modelpress.progress import Progress, silent
from modelpress.reports import Report
from modelpress.store.base import Store
from registry import gates, versions
from registry.gates import Decision
from registry.versions import Version

CHAMPION: str = GateConfig().alias
BY_ALIAS = "promote by alias"
"""Reason of a pointer's entry that a person asked for by setting the alias in MLflow."""
MAX_LOOKS = 10
TAG_UNDONE = "undone"
"""Tags of a version whose promotion was undone: `undone.alias`, `undone.at`, `undone.why`."""

if TYPE_CHECKING:
    from registry.promotion import Judged

Ask = Callable[["Judged"], str]
Action = Literal["agrees", "followed", "promoted", "undone", "asked", "stuck"]


class Outcome(Report):
    """What became of one alias."""

    name: str
    """The registered model."""
    alias: str
    """The alias."""
    action: Action
    """`agrees`: nothing was to do. `followed`: MLflow's alias was set to what the pointer says. `promoted`: the pointer
    follows the alias. `undone`: the alias went back. `asked`: it went back until a person approves. `stuck`: no version
    carries what the pointer names."""
    version: str = ""
    """Number of the version that the alias named; empty where there was no alias."""
    wanted: str = ""
    """Digest of the pack of that version; empty where it has none."""
    pack: str = ""
    """Digest that the pointer names now; empty where there is none."""
    why: str = ""
    """The reason, for people."""
    decision: Decision | None = None
    """What the gate said, where it was asked."""


class Differing(Report):
    """An alias that does not say what its pointer says."""

    name: str
    """The registered model."""
    alias: str
    """The alias."""


class _MovedError(Exception):
    """Somebody moved the alias or the pointer since we looked."""


@dataclass(frozen=True)
class Seen:
    """What stands for one alias at one moment."""

    name: str
    alias: str
    version: Version | None
    """That MLflow's alias names."""
    entry: pointer.Pointer | None
    """The pointer's newest."""
    followed: int
    """Number of the entry that MLflow was known to follow; 0 where nobody noted it."""

    @property
    def agrees(self) -> bool:
        """Whether the alias and the pointer name the same pack, or there is neither."""
        if self.version is None or self.entry is None:
            return self.version is None and self.entry is None
        return self.version.pack == self.entry.pack

    @property
    def number(self) -> str:
        """Of the version; empty where there is none."""
        return self.version.number if self.version else ""

    @property
    def standing(self) -> int:
        """Number of the newest entry; 0 for an empty log."""
        return self.entry.number if self.entry else 0

    def outcome(self, action: Action, why: str = "", decision: Decision | None = None, pack: str = "") -> Outcome:
        """Of what was seen here."""
        return Outcome(
            name=self.name,
            alias=self.alias,
            action=action,
            version=self.number,
            wanted=self.version.pack if self.version else "",
            pack=pack or (self.entry.pack if self.entry else ""),
            why=why,
            decision=decision,
        )


def look(store: Store, client: MlflowClient, name: str | None = None) -> list[Differing]:
    """The watched aliases that do not say what their pointers say, of one model or of all.

    Costs a request or two to the store and to MLflow for each alias; no weight is read. A pointer that is damaged or
    not vouched for counts as differing: `settle` says what is wrong with it, and no other model waits for that.

    Raises:
        StoreError: the store could not be asked.
    """
    found = []
    for model in _models(client, name):
        logs = set(store.folders(f"{keys.manifests(model.name)}refs/"))
        for alias in sorted({one for one in (*logs, *model.aliases) if keys.is_alias(one)}):
            if _differs(store, client, model, alias, watched=alias in logs):
                found.append(Differing(name=model.name, alias=alias))
    return found


def settle(
    store: Store,
    client: MlflowClient,
    name: str,
    alias: str,
    progress: Progress = silent,
    ask: Ask = lambda _: "start the flow promote, which asks",
) -> Outcome:
    """Bring MLflow's alias and the pointer together; see this module's table.

    Args:
        store: the publication store.
        client: MLflow.
        name: of the registered model.
        alias: that may differ.
        progress: told while published bytes are read.
        ask: sees to it that a person is asked, and says where; more often than once for the same judgement, where
            somebody moves something meanwhile.

    Raises:
        ConflictError: somebody moves one of them all the time.
        StoreError, TrustError: the store could not be asked, or refuses the move: nothing changed, to be tried again.
        MlflowException: the same of MLflow.
    """
    for _ in range(MAX_LOOKS):
        seen = see(store, client, name, alias)
        try:
            return _settle(store, client, seen, progress, ask)
        except (_MovedError, ConflictError):
            continue
    raise ConflictError(
        f"reconciling {name}@{alias}",
        found=f"an alias or a pointer that moved under each of {MAX_LOOKS} looks",
        fix="find out who moves it all the time; the next look tries again",
    )


def see(store: Store, client: MlflowClient, name: str, alias: str) -> Seen:
    """What stands now."""
    model = client.get_registered_model(name)
    return _seen(store, client, model, alias)


def _models(client: MlflowClient, name: str | None) -> Iterator[RegisteredModel]:
    """One registered model, if there is one, or all; those whose name no pack can have are not ours."""
    if name is not None:
        try:
            yield client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                raise
        return
    token: str | None = None
    while True:
        page = client.search_registered_models(page_token=token)
        yield from (model for model in page if keys.is_name(model.name))
        token = page.token
        if not token:
            return


def _differs(store: Store, client: MlflowClient, model: RegisteredModel, alias: str, *, watched: bool) -> bool:
    try:
        seen = _seen(store, client, model, alias)
    except (FormatError, TrustError):
        return True
    if seen.agrees and seen.standing == seen.followed:
        return False
    return watched or _ours(store, seen)


def _ours(store: Store, seen: Seen) -> bool:
    """Whether an alias that never had a pointer is one that we watch."""
    if seen.version is None:
        return False
    if seen.version.tags.get(versions.TAG_GATE_ALIAS) == seen.alias:
        return True
    return seen.alias == CHAMPION and next(store.list(keys.manifests(seen.name)), None) is not None


def _seen(store: Store, client: MlflowClient, model: RegisteredModel, alias: str) -> Seen:
    followed = model.tags.get(versions.FOLLOWED + alias, "")
    return Seen(
        name=model.name,
        alias=alias,
        version=versions.by_alias(client, model.name, alias),
        entry=pointer.current(store, model.name, alias),
        followed=int(followed) if followed.isdecimal() else 0,
    )


def _settle(store: Store, client: MlflowClient, seen: Seen, progress: Progress, ask: Ask) -> Outcome:
    if seen.agrees:
        if seen.entry is not None and seen.followed != seen.standing:
            versions.note_followed(client, seen.entry)
        return seen.outcome("agrees")
    if seen.version is None:
        return _follow(store, client, seen, "the alias was deleted, and the pack is served")
    if _lags(store, seen):
        assert seen.entry is not None
        why = f"MLflow had missed entry {seen.entry.number}, a {seen.entry.reason} by {seen.entry.who}"
        return _follow(store, client, seen, why)
    return _answer(store, client, seen, seen.version, progress, ask)


def _lags(store: Store, seen: Seen) -> bool:
    """Whether the alias says what the pointer said since MLflow was known to follow."""
    if seen.entry is None or seen.version is None or seen.followed >= seen.standing:
        return False
    entries = pointer.history(store, seen.name, seen.alias)
    return any(entry.pack == seen.version.pack for entry in entries if entry.number >= seen.followed)


def _follow(store: Store, client: MlflowClient, seen: Seen, why: str) -> Outcome:
    assert seen.entry is not None
    version = versions.find(client, seen.name, seen.entry.pack)
    if version is None:
        fix = "run the optimize flow again with its recipe: it registers what is published"
        return seen.outcome("stuck", f"{why}; no model version carries it: {fix}")
    _set_back(store, client, seen, version)
    versions.note_followed(client, seen.entry)
    versions.note(client, version, f"{_now()}: alias `{seen.alias}` was set again: {why}.")
    return seen.outcome("followed", why)


def _answer(store: Store, client: MlflowClient, seen: Seen, version: Version, progress: Progress, ask: Ask) -> Outcome:
    """A person set the alias: judge, then move the pointer or undo."""
    from registry import promotion  # reads weights, and so brings torch; a look does without

    if not keys.is_digest(version.pack):
        return _undo(store, client, seen, version, "this version carries no pack of modelpress")
    if seen.entry is not None and of_canaries([seen.entry]):
        why = f"a canary begins with `modelpress promote {seen.name} {version.number} --canary default`"
        return _undo(store, client, seen, version, why)
    pointer.check_may_append(store, seen.name, seen.alias)  # a refusal here is not the candidate's
    try:
        judged = promotion.judge(store, client, seen.name, version.pack, None, progress, alias=seen.alias)
    except (NotFoundError, FormatError, TrustError) as error:
        return _undo(store, client, seen, version, f"its pack can't be served: {error.doing}: {error.found}")
    if gates.waits(judged.decision):
        _check_still(store, client, seen)
        why = f"it passed the gate, which asks for a person's approval: {ask(judged)}"
        return _undo(store, client, seen, version, why, judged.decision).model_copy(update={"action": "asked"})
    if not judged.decision.promote:
        why = f"the gate said {judged.decision.verdict}: {'; '.join(judged.decision.reasons)}"
        return _undo(store, client, seen, version, why, judged.decision)
    if judged.after != seen.standing:
        raise _MovedError
    _check_still(store, client, seen)
    entry = promotion.append(store, judged, BY_ALIAS)
    versions.note_followed(client, entry)
    return seen.outcome("promoted", judged.decision.line(), judged.decision, entry.pack)


def _undo(
    store: Store, client: MlflowClient, seen: Seen, version: Version, why: str, decision: Decision | None = None
) -> Outcome:
    """Say on the version why its promotion does not stand, and let the alias name what is served."""
    back = versions.find(client, seen.name, seen.entry.pack) if seen.entry else None
    _check_still(store, client, seen)
    tags = {"alias": seen.alias, "at": _now(), "why": why[: versions.MAX_TAG]}
    versions.annotate(client, version, {f"{TAG_UNDONE}.{key}": value for key, value in tags.items()})
    where = f"set back to version {back.number}" if back else "taken away"
    versions.note(client, version, f"{_now()}: alias `{seen.alias}`, set by hand in MLflow, was {where}: {why}.")
    _set_back(store, client, seen, back)
    return seen.outcome("undone", why, decision)


def _set_back(store: Store, client: MlflowClient, seen: Seen, version: Version | None) -> None:
    """Let the alias name this version, or none; as right after it is right before.

    Raises:
        _MovedError: somebody moved something; the alias follows the pointer then, or is theirs.
    """
    _check_still(store, client, seen)
    if version is None:
        client.delete_registered_model_alias(seen.name, seen.alias)
    else:
        versions.set_alias(client, version, seen.alias)
    entry = pointer.current(store, seen.name, seen.alias)
    if (entry.number if entry else 0) != seen.standing:  # what we set would pass for a person's wish
        versions.follow_pointer(store, client, seen.name, seen.alias)
        raise _MovedError


def _check_still(store: Store, client: MlflowClient, seen: Seen) -> None:
    """Look again, right before something is written.

    Raises:
        _MovedError: it is not what was seen.
    """
    version, entry = versions.by_alias(client, seen.name, seen.alias), pointer.current(store, seen.name, seen.alias)
    if (version.number if version else "") != seen.number or (entry.number if entry else 0) != seen.standing:
        raise _MovedError


def _now() -> str:
    return datetime.now(UTC).isoformat(" ", "seconds").replace("+00:00", " UTC")
