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
from typing import NoReturn

from modelpress.errors import ModelpressError, SetupError, StoreError
from modelpress.parallel import jobs
from modelpress.parallel.ranks import Ranks, joined
from modelpress.place import Place, pinned
from modelpress.progress import silent
from modelpress.resume import kept_on
from modelpress.store.base import Store, open_store


def main(folder: str) -> int:
    """Be a rank of the job in `folder`; the exit status."""
    if os.environ.get(jobs.WATCHED):
        threading.Thread(target=_end_with_launcher, daemon=True).start()
    store = open_store(folder)
    try:
        job = jobs.read(store, jobs.JOB, jobs.Job)
        with joined(job.parallel) as ranks:
            try:
                _run(job, store, ranks)
            except ModelpressError as error:
                _leave(store, error)
    except SetupError as error:
        if os.environ.get("TORCHELASTIC_RESTART_COUNT") == os.environ.get("TORCHELASTIC_MAX_RESTARTS"):
            _leave(store, error)
        print(error, file=sys.stderr, flush=True)  # a port that somebody took meanwhile: the next attempt has another
        os._exit(error.exit_code)
    except ModelpressError as error:
        _leave(store, error)
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


def _leave(store: Store, error: ModelpressError) -> NoReturn:
    """Write the error down and end at once: sockets close, and those who wait for this rank know."""
    rank = int(os.environ.get("RANK", "0"))
    print(error, file=sys.stderr, flush=True)
    with contextlib.suppress(StoreError):  # the log has it
        store.put(f"{jobs.ERRORS}{rank}.json", jobs.refusal(error, rank).model_dump_json().encode())
    os._exit(error.exit_code)


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
