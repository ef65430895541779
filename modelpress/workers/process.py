"""What a worker process runs: job after job, until its parent is gone.

`python -m modelpress.workers.process CORES` is started by `modelpress.workers.pool`, and by nobody else.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time

from modelpress.errors import ModelpressError


def main(cores: str) -> None:
    """Read a job from each line of stdin, and write a reply for each to stdout."""
    if hasattr(os, "sched_setaffinity"):  # before anything counts cores and starts threads
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no reply
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(jobs,), name="parent", daemon=True).start()

    from modelpress.workers.jobs import Bench  # after the cores are set: it imports torch
    from modelpress.workers.protocol import Failure, Job, Reply

    def say(reply: Reply) -> None:
        replies.write(reply.model_dump_json().encode() + b"\n")
        replies.flush()

    say(Reply())
    bench = Bench()
    while True:
        job = Job.model_validate_json(jobs.get())
        started = time.perf_counter()
        try:
            part = bench.do(job)
        except ModelpressError as error:
            failure = Failure(
                kind=type(error).__name__,
                doing=error.doing,
                found=error.found,
                expected=error.expected,
                fix=error.fix,
            )
            say(Reply(failure=failure, seconds=time.perf_counter() - started))
        else:
            say(Reply(part=part, seconds=time.perf_counter() - started))


def _listen(jobs: queue.SimpleQueue[bytes]) -> None:
    """Hand on what the parent asks. When it is gone, so is the reason for this process, whatever it is doing."""
    for line in sys.stdin.buffer:
        jobs.put(line)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
