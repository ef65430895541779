"""Going back over HTTP: `POST /v2/repository/models/{name}/rollback`, for keys with the scope `promote`.

It appends to the pointer's log, as `modelpress rollback` does, and loads what it names. It is off unless it is switched
on, since the server's credentials then must be able to write pointers. MLflow's alias follows by `reconcile`.

The body, all of it optional: `to`, digest of the pack to go back to, one that this alias named before (left out: the
one before the current); `from`, the pack that the asker sees as current; `token`, which names the attempt: a retry that
carries it goes no further back.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from modelpress import pointer
from modelpress.store.threads import DaemonPool
from serving.models import ServedModel
from serving.moving import DIGEST, TOKEN, ElsewhereError, Moved, Mover, check_current, retried
from serving.repository import Repository

PATH = "/v2/repository/models/{name}/rollback"
LEGAL = {"to": DIGEST, "from": DIGEST, "token": TOKEN}


class Rollback:
    """The door.

    Args:
        repository: what is served.
        enabled: whether it opens.
    """

    def __init__(self, repository: Repository, enabled: bool) -> None:
        self._store = repository.store
        self._mover = Mover(repository, enabled, "ROLLBACK", "rolling back", "rollback", DaemonPool(1, "rollback"))

    async def endpoint(self, request: Request) -> Response:
        """`POST`; answers with what the pointer names now, and what answers."""
        return await self._mover.answer(request, LEGAL, self._append)

    def _append(self, model: ServedModel, asked: dict[str, str], by: str) -> Moved:
        """
        Raises:
            ElsewhereError: nothing is done.
            ModelpressError: see `pointer.append`.
        """
        name, alias, token, to = model.name, model.alias, asked.get("token"), asked.get("to")
        entries = pointer.history(self._store, name, alias)
        if (done := retried(entries, token)) is not None:
            return done
        where, back = f"model {name!r}: pointer", pointer.standing(entries)
        current = check_current(where, entries, asked.get("from"))
        if to is None and len(back) < 2:
            raise ElsewhereError(where, found="nothing before what stands", expected="an earlier pack to go back to")
        to = to or back[-2]
        if to == current or to not in {entry.pack for entry in entries}:
            # Another pack would come past the gate.
            raise ElsewhereError(f"{where}: to", found=f"pack {to}", expected="one that stood before, and not now")
        after = len(entries)
        made = pointer.append(self._store, name, alias, to, pointer.ROLLBACK, after=after, token=token, by=by)
        return Moved(made, current)
