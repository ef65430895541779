"""A process that holds a declared device in a flow run: `python -m tests.integration.gpu_holder JSON`.

It prints a line of JSON when it holds the device, waits until its standard input ends, and prints another when it is
about to let go. Times are of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import json
import sys
import time

from prefect import flow

from modelpress.config import GpuConfig
from tasks.devices import Device, held


@flow(name="holder", flow_run_name="{name}")
def hold(name: str, devices: list[dict[str, object]], memory: int | None, wait: float) -> None:
    declared = [Device(**one) for one in devices]  # type: ignore[arg-type]
    with held(GpuConfig(memory=memory, wait_seconds=wait), name, declared, lease_seconds=60) as device:
        print(json.dumps({"device": device.uuid, "at": time.monotonic()}), flush=True)
        sys.stdin.read()
        print(json.dumps({"device": device.uuid, "at": time.monotonic()}), flush=True)


if __name__ == "__main__":
    hold(**json.loads(sys.argv[1]))
