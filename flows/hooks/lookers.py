"""Who looks where an event points: this process, which is warm, or a worker, which has the keys.

`Here` looks by itself, and runs the flow `reconcile` in this process where something differs: a fresh process imports
for seconds what this one has. It also looks at everything when it starts and every `poll_seconds`: events that came
while nobody listened are made up for. It needs the store's and MLflow's credentials.

`ByWorker` creates a run of the deployment `reconcile`, and needs Prefect's alone: for a receiver that stands where
strangers reach it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound, PrefectException

from flows.hooks.app import Hint, StartError
from flows.reconcile import reconcile
from modelpress.errors import ModelpressError, SetupError
from registry import runs
from registry.reconcile import look
from tasks.reconcile import opened

log = logging.getLogger("modelpress.hooks")

MAX_WAITING = 10_000
"""Models that wait to be looked at; more are left to the next look at everything."""


class Here:
    """Looks in a thread of this process, at one model after the other."""

    def __init__(self, poll_seconds: float) -> None:
        self._poll = poll_seconds
        self._waiting: dict[str, None] = {}
        """In the order in which they came; a second hint for one that waits adds nothing."""
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="look", daemon=True)

    def start(self) -> None:
        """Begin, with a look at everything."""
        self._thread.start()

    def stop(self) -> None:
        """Ask it to end after what it does now."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    @property
    def alive(self) -> bool:
        """Whether it still looks: an error that nobody foresaw ended it, and is in the log."""
        return self._thread.is_alive()

    def look(self, hint: Hint) -> None:
        """Look at this model next."""
        if not self.alive:
            raise StartError("the thread that looks has ended; see the log, and start the receiver again")
        with self._changed:
            if len(self._waiting) >= MAX_WAITING and hint.name not in self._waiting:
                raise StartError(f"{MAX_WAITING} models wait to be looked at")
            self._waiting[hint.name] = None
            self._changed.notify()

    def _run(self) -> None:
        import registry.promotion  # noqa: F401  seconds, now and not at the first click

        self._look_at(None)
        seen = time.monotonic()
        while True:
            with self._changed:
                left = max(0.0, seen + self._poll - time.monotonic()) if self._poll else None
                self._changed.wait_for(lambda: bool(self._waiting) or self._stopped, left)
                if self._stopped:
                    return
                due = self._poll > 0 and time.monotonic() >= seen + self._poll  # hints without end hold up no poll
                name = None if due or not self._waiting else next(iter(self._waiting))
                if name is not None:
                    del self._waiting[name]
            self._look_at(name)
            if name is None:
                seen = time.monotonic()

    def _look_at(self, name: str | None) -> None:
        """Run the flow for each model that differs. What goes wrong (a server is down, a pack is bad) is logged, and
        looked at again later."""
        try:
            store, client = opened()
            with runs.named_errors(client.tracking_uri):
                models = sorted({found.name for found in look(store, client, name)})
        except ModelpressError as error:
            log.error("looking at %s: %s", name or "every model", error)
            return
        for model in models:
            try:
                with named_errors("running the flow reconcile"):
                    reconcile(model)
            except ModelpressError as error:
                log.error("reconciling %s: %s", model, error)


class ByWorker:
    """Creates a run of a deployment for each event.

    Args:
        deployment: `FLOW/DEPLOYMENT`.
    """

    def __init__(self, deployment: str) -> None:
        self._deployment = deployment

    def check(self) -> None:
        """See that the deployment is there.

        Raises:
            SetupError: it is not, or Prefect does not answer.
        """
        doing = f"looking up the deployment {self._deployment!r}"
        with named_errors(doing), get_client(sync_client=True) as client:
            try:
                client.read_deployment_by_name(self._deployment)
            except ObjectNotFound as error:
                fix = "deploy it: prefect --no-prompt deploy --all --prefect-file infra/prefect.yaml"
                raise SetupError(doing, found="Prefect's server has none of this name", fix=fix) from error

    @property
    def alive(self) -> bool:
        """There is nothing here that could end."""
        return True

    def look(self, hint: Hint) -> None:
        """Create the run; the same event, handed on by two receivers, makes one."""
        try:
            doing = f"creating a run of the deployment {self._deployment!r}"
            with named_errors(doing), get_client(sync_client=True) as client:
                deployment = client.read_deployment_by_name(self._deployment)
                client.create_flow_run_from_deployment(
                    deployment.id,
                    parameters={"name": hint.name},
                    tags=["webhook"],
                    idempotency_key=f"mlflow-{hint.delivery}",
                )
        except SetupError as error:
            log.error("%s", error)
            raise StartError("Prefect can't be told to look now") from error


@contextmanager
def named_errors(doing: str) -> Iterator[None]:
    """What Prefect or the way to it refuses in this block becomes a `SetupError`."""
    fix = "start Prefect's server, or mend PREFECT_API_URL and the login to it"
    try:
        yield
    except (PrefectException, httpx.HTTPError) as error:
        raise SetupError(doing, found=f"{type(error).__name__}: {error}"[:500], fix=fix) from error
    except RuntimeError as error:
        if "Failed to reach API" not in str(error):
            raise
        raise SetupError(doing, found=str(error), fix=fix) from error
