"""Promotion over HTTP: `POST /v2/repository/models/{name}/promote`, for keys with the scope `promote`.

Nothing is judged here: the gate needs MLflow and the published bytes, and has done its work before
(`modelpress promote --judge-only`). The pointer moves to a pack if the newest decision on exactly this pack that counts
let it through, or a person overrode it by name, and if it was judged against the pack that stands. With a trust file
only decisions count that a key which may move aliases signed. The pack is loaded and tested beside the one that answers
before anything moves.

The body: `pack`, its whole digest; optional `from` and `token`, as for a rollback.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from modelpress import decisions, pointer
from modelpress.decisions import Record
from modelpress.errors import ModelpressError, StoreUnavailableError
from modelpress.store.threads import DaemonPool
from serving.models import ServedModel, public_reason
from serving.moving import DIGEST, TOKEN, ElsewhereError, Moved, Mover, check_current, retried
from serving.refusals import RequestError
from serving.repository import Repository

PATH = "/v2/repository/models/{name}/promote"
LEGAL = {"pack": DIGEST, "from": DIGEST, "token": TOKEN}


class Promote:
    """The door.

    Args:
        repository: what is served.
        enabled: whether it opens.
    """

    def __init__(self, repository: Repository, enabled: bool) -> None:
        self._repository, self._store = repository, repository.store
        self._mover = Mover(repository, enabled, "PROMOTE", "promoting", "promote", DaemonPool(1, "promote"))

    async def endpoint(self, request: Request) -> Response:
        """`POST`; answers with what the pointer names now, and what answers."""
        return await self._mover.answer(request, LEGAL, self._append)

    def _append(self, model: ServedModel, asked: dict[str, str], by: str) -> Moved:
        """
        Raises:
            RequestError: nothing is done.
            ModelpressError: see `pointer.append`.
        """
        if "pack" not in asked:
            raise RequestError("body: pack", found="nothing", expected="the digest of what is to be served")
        pack, token, name, alias = asked["pack"], asked.get("token"), model.name, model.alias
        entries = pointer.history(self._store, name, alias)
        if (done := retried(entries, token)) is not None:
            return done
        where = f"model {name!r}: pointer"
        current = check_current(where, entries, asked.get("from"))
        if pack == current:
            raise ElsewhereError(where, found=f"pack {pack} already", expected="another one")
        record = self._decided(name, alias, pack, current)
        held = pack in model.held
        try:
            self._stage(name, pack)
            reason = pointer.OVERRIDE if record.decision.override else pointer.PROMOTE
            said = record.decision.model_dump(mode="json") | {decisions.RECORD: record.digest}
            made = pointer.append(self._store, name, alias, pack, reason, said, after=len(entries), token=token, by=by)
            if not model.unloaded:
                self._repository.look(name)  # takes over what is staged
        finally:
            if not held:
                self._repository.release(name, pack)
        return Moved(made, current)

    def _decided(self, name: str, alias: str, pack: str, current: str | None) -> Record:
        """The decision that lets the pack through.

        Raises:
            ElsewhereError: there is none.
        """
        where, judge = f"model {name!r}: decision on pack {pack}", f"modelpress promote {name} {pack} --judge-only"
        page = decisions.kept(self._store, name, pack)
        if page.gone:
            # What was deleted may be the refusal that came after a pass.
            raise ElsewhereError(where, found="a gap: one was deleted", expected=f"`modelpress promote {name} {pack}`")
        counting = [one.record for one in page.found if one.record is not None and one.problem is None]
        of_alias = [record for record in counting if record.alias == alias]
        if not of_alias:
            problems = [one.problem.found or "" for one in page.found if one.problem is not None]
            found = f"none that counts ({problems[0][:200]})" if problems else "none"
            raise ElsewhereError(where, found=found, expected=f"one by the gate: {judge}")
        newest = of_alias[0]
        if not newest.decision.promote:
            raise ElsewhereError(where, found=newest.decision.outcome(), expected="one that lets it through")
        if newest.champion != current:
            found = f"one against pack {newest.champion}"
            raise ElsewhereError(where, found=found, expected=f"one against pack {current}, which stands: {judge}")
        return newest

    def _stage(self, name: str, pack: str) -> None:
        """Load it beside the one that answers, with its self-test."""
        try:
            self._repository.hold(name, pack)
        except StoreUnavailableError:
            raise
        except ModelpressError as error:
            found = public_reason(error)
            raise ElsewhereError(f"model {name!r}: pack {pack}", found=found, expected="one that runs here") from error
