"""`optimize` as an entry point of deployments that tests kill: the flow as it is, on a store that strikes.

The file `kill.json` in MODELPRESS_HOME says at which writes processes kill themselves, one after another:
`[{"when": "before", "key": "stages/distill/", "count": 1}]`, before the first write under a key that begins so. Writes
are what one process leaves to the next: between two of them nothing changes that the next one could find. An order is
gone when it has struck.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from flows.optimize import optimize
from modelpress.store.local import LocalStore

__all__ = ["optimize"]

_put, _seen = LocalStore.put, 0


def _striking(self: LocalStore, key: str, *given: Any, **named: Any) -> bool:
    global _seen
    home = Path(os.environ["MODELPRESS_HOME"])
    orders = json.loads((home / "kill.json").read_text()) if (home / "kill.json").exists() else []
    strikes = bool(orders) and key.startswith(orders[0]["key"])
    if strikes:
        _seen += 1
        strikes = _seen >= orders[0]["count"]
    if strikes and orders[0]["when"] == "before":
        _die(home, orders)
    created = _put(self, key, *given, **named)
    with (home / "writes.log").open("a") as log:
        log.write(f"{os.getpid()} {key}\n")
    if strikes:
        _die(home, orders)
    return created


def _die(home: Path, orders: list[dict[str, Any]]) -> None:
    (home / "kill.json").write_text(json.dumps(orders[1:]))
    with (home / "deaths.log").open("a") as log:
        log.write(f"{time.time()} {json.dumps(orders[0])}\n")
    os.kill(os.getpid(), signal.SIGKILL)


LocalStore.put = _striking  # type: ignore[method-assign]
