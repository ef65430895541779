"""One rank of a job, as torchrun starts it: `python -m modelpress.parallel.rank FOLDER`.

Everything that decides what it does stands in the folder's `job.json`; who it is, and where its like are, in the
environment that torchrun makes. Started again, it goes on from the state that is kept.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from typing import NoReturn

from modelpress.errors import ModelpressError, SetupError, StoreError
from modelpress.parallel import jobs, lease
from modelpress.parallel.ranks import Ranks, joined
from modelpress.place import Place, pinned
from modelpress.progress import silent
from modelpress.resume import kept_on
from modelpress.store.base import Store, open_store


def main(folder: str, patience: float | None = None) -> int:
    """Be a rank of the job in `folder`; the exit status.

    Where nobody waits for the job any more, it ends at once with status 0: nothing is to be done, and torchrun starts
    no rank again. The state that is kept stays.

    Args:
        folder: a store's URI.
        patience: seconds of silence after which the run that waits counts as gone; None: the job's
            `parallel.timeout_seconds`, and at least a minute.
    """
    if os.environ.get(jobs.WATCHED):
        threading.Thread(target=_end_with_launcher, daemon=True).start()
    store = open_store(folder)
    watch: lease.Watch | None = None
    try:
        job = jobs.read(store, jobs.JOB, jobs.Job)
        if not os.environ.get(jobs.WATCHED):
            least = max(job.parallel.timeout_seconds, lease.LEAST_PATIENCE_SECONDS)
            watch = lease.Watch(store, least if patience is None else patience)
            _end_if_gone(watch)
            threading.Thread(target=_end_with_run, args=(watch,), daemon=True).start()
        with joined(job.parallel) as ranks:
            try:
                _run(job, store, ranks)
            except ModelpressError as error:
                _leave(store, error, watch)
    except SetupError as error:
        _end_if_gone(watch)
        if os.environ.get("TORCHELASTIC_RESTART_COUNT") == os.environ.get("TORCHELASTIC_MAX_RESTARTS"):
            _leave(store, error)
        print(error, file=sys.stderr, flush=True)  # a port that somebody took meanwhile: the next attempt has another
        os._exit(error.exit_code)
    except ModelpressError as error:
        _leave(store, error, watch)
    except RuntimeError:  # as PyTorch says that another rank is gone
        _end_if_gone(watch)
        raise
    return 0


def _run(job: jobs.Job, store: Store, ranks: Ranks) -> None:
    shelf = jobs.JobShelf(job.states, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0") if job.states else None
    progress = jobs.JobProgress(store) if ranks.first else silent
    with contextlib.ExitStack() as stack:
        if ranks.device.type != "cpu":
            stack.enter_context(pinned(Place(ranks.device)))
        if shelf is not None:
            stack.enter_context(kept_on(shelf))
        output, report = jobs.work(job, progress)
    if ranks.first:
        store.put(jobs.OUTPUT, output)
        result = jobs.Result(report=report.model_dump(mode="json"), told=shelf.told if shelf is not None else [])
        store.put(jobs.RESULT, result.model_dump_json().encode())
    ranks.sum([0.0])  # torchrun waits for all; those who are done early keep their sockets open for the first


def _leave(store: Store, error: ModelpressError, watch: lease.Watch | None = None) -> NoReturn:
    """Write the error down and end at once: sockets close, and those who wait for this rank know."""
    _end_if_gone(watch)
    rank = int(os.environ.get("RANK", "0"))
    print(error, file=sys.stderr, flush=True)
    with contextlib.suppress(StoreError):  # the log has it
        store.put(f"{jobs.ERRORS}{rank}.json", jobs.refusal(error, rank).model_dump_json().encode())
    os._exit(error.exit_code)


def _end_if_gone(watch: lease.Watch | None) -> None:
    """End here where nobody waits any more, whatever this rank was doing."""
    reason = watch.gone() if watch is not None else None
    if reason is not None:
        print(f"the ranks end: {reason}", file=sys.stderr, flush=True)
        os._exit(0)


def _end_with_run(watch: lease.Watch) -> NoReturn:
    while True:
        time.sleep(lease.LOOK_SECONDS)
        _end_if_gone(watch)


def _end_with_launcher() -> None:
    while os.read(0, 1):
        pass
    agent = os.getppid()
    if agent > 1:
        with contextlib.suppress(ProcessLookupError):
            os.kill(agent, signal.SIGTERM)  # or it would start this rank again
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
