"""What a worker process runs: job after job, until its parent is gone.

`python -m modelpress.workers.process CORES` is started by `modelpress.workers.pool`, and by nobody else. Another module
that does other jobs is started the same way; it calls `serve`.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from modelpress.errors import ModelpressError

if TYPE_CHECKING:
    from modelpress.reduce import Part


def main(cores: str) -> None:
    """Do slices of stages."""
    serve(cores, _slices)


def _slices() -> Callable[[bytes], Part]:
    from modelpress.workers.jobs import Bench
    from modelpress.workers.protocol import Job

    bench = Bench()
    return lambda line: bench.do(Job.model_validate_json(line))


def serve(cores: str, opened: Callable[[], Callable[[bytes], Part]]) -> None:
    """Read a job from each line of stdin, and write a reply for each to stdout.

    Args:
        cores: that this process runs on, parted by commas.
        opened: imports what jobs need, and returns what does one: a line of JSON in, the result out.
    """
    if hasattr(os, "sched_setaffinity"):  # before anything counts cores and starts threads
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no reply
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(jobs,), name="parent", daemon=True).start()

    do = opened()  # after the cores are set: it imports torch
    from modelpress.workers.protocol import Failure, Reply

    def say(reply: Reply) -> None:
        replies.write(reply.model_dump_json().encode() + b"\n")
        replies.flush()

    say(Reply())
    while True:
        line = jobs.get()
        started = time.perf_counter()
        try:
            part = do(line)
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
