"""Publish and promote in child processes that are killed at every moment, and check what is visible after each.

Run as a program, for every STRIDE-th moment: ``python -m tests.faults.killed_publisher STORE_URI FOLDER STRIDE``.
Forking happens before any thread starts, and every child opens its own store.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from modelpress import load, pointer
from modelpress.settings import Settings
from modelpress.store import Store, open_store
from tests.packs import Pack, make_pack

MOMENTS_MAX = 100


def dying(store: Store, moment: int) -> Store:
    """`store`, whose process is killed before (even `moment`) or after (odd) its write number `moment` // 2."""
    original, count = store.put, 0

    def put(key: str, data: bytes | Path, *, if_absent: bool = False, sha256: str | None = None) -> bool:
        nonlocal count
        mine, count = count, count + 1
        if mine * 2 == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        created = original(key, data, if_absent=if_absent, sha256=sha256)
        if mine * 2 + 1 == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return created

    store.put = put  # type: ignore[method-assign]
    return store


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked process; 0, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            if code:
                traceback.print_exc()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def deliver(store: Store, pack: Pack) -> None:
    pack.publish(store)
    pointer.append(store, "demo", "champion", pack.digest, "promote", token=pack.digest)


def check(store: Store, before: Pack, after: Pack, *, done: bool = False) -> None:
    """Every manifest in sight verifies, and the log is the old one or the new one."""
    names = [info.key for info in store.list("packs/demo/") if "/refs/" not in info.key]
    visible = {name.rpartition("/")[2].removesuffix(".json") for name in names}
    for digest in visible:
        load.verify(store, "demo", digest)
    log = [entry.pack for entry in pointer.history(store, "demo", "champion")]
    assert before.digest in visible
    assert log in ([before.digest], [before.digest, after.digest]), log
    assert not done or log == [before.digest, after.digest]
    assert not done or visible == {before.digest, after.digest}


def main(uri: str, folder: Path, stride: int) -> int:
    before, after = make_pack(folder / "before"), make_pack(folder / "after", max_shard=20_000)
    for moment in range(0, MOMENTS_MAX, stride):
        place = f"{uri}/{moment}"

        def first_run(place: str = place, moment: int = moment) -> None:
            deliver(open_store(place, Settings()), before)
            deliver(dying(open_store(place, Settings()), moment), after)

        def second_run(place: str = place) -> None:
            store = open_store(place, Settings())
            check(store, before, after)
            deliver(store, after)
            check(store, before, after, done=True)

        code = in_child(first_run)
        assert in_child(second_run) == 0, f"after a kill at moment {moment}"
        if code == 0:  # the run ended before this moment: every earlier one was tried
            print(f"killed up to moment {moment}")
            return 0
        assert code == -signal.SIGKILL, code
    raise AssertionError("more moments than a pack has writes")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
