"""GPU slots: a stage that computes on a GPU holds it, and says so where everybody sees it.

Each device has a global concurrency limit on the Prefect server, `gpu.<uuid>`, with one slot for each GiB of its
memory. The name has no host in it: a device's uuid is its own wherever it is seen from, and a container's host name is
not. A stage takes as many slots as the recipe's `gpu.memory` asks for, or all. Its lease is renewed while the stage
runs; when the process dies, the server takes the slots back once the lease is over. A run without a `gpu` asks the
server nothing.
"""

from __future__ import annotations

import asyncio
import math
import random
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import ConcurrencyLeaseHolder, StateType
from prefect.client.schemas.responses import GlobalConcurrencyLimitResponse
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from modelpress.config import GpuConfig
from modelpress.errors import ConfigError, SetupError, StageError
from modelpress.settings import read_settings

SLOT_BYTES = 2**30
ROUND_SECONDS = 5.0
"""Between two looks at the devices, give or take half."""
SAY_SECONDS = 60.0
"""Between two log lines of a stage that waits."""
LOCKED = 423
"""What the server answers where the slots are taken."""


@dataclass(frozen=True)
class Device:
    """A GPU as its driver describes it."""

    uuid: str
    name: str
    memory_bytes: int
    index: int
    """Its number in this process."""

    @property
    def limit(self) -> str:
        """Name of its concurrency limit."""
        return f"gpu.{re.sub(r'[^A-Za-z0-9-]+', '-', self.uuid)}"

    @property
    def slots(self) -> int:
        """Whole GiB."""
        return self.memory_bytes // SLOT_BYTES

    def __str__(self) -> str:
        return f"{self.name} ({self.limit}, {self.slots} GiB)"


def cuda_devices() -> list[Device]:
    """The GPUs that torch sees here.

    Raises:
        SetupError: none.
    """
    import torch

    if not torch.cuda.is_available():
        raise SetupError(
            "looking for a GPU",
            found=f"none that torch {torch.__version__} can use",
            expected="at least one: the recipe asks for a GPU",
            fix="run it on a worker with one (`modelpress doctor`), or leave out gpu and name the CPUExecutionProvider",
        )
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [Device(str(one.uuid), one.name, one.total_memory, index) for index, one in enumerate(found)]


@contextmanager
def held(gpu: GpuConfig, stage: str, devices: Sequence[Device], lease_seconds: float) -> Iterator[Device]:
    """Hold the first of the devices that has the slots free, waiting for one.

    Args:
        gpu: the need, and how long to wait.
        stage: who asks, for the log.
        devices: in the order in which they are tried.
        lease_seconds: how long the slots stay taken when this process dies.

    Raises:
        ConfigError: no device is as large as the need.
        SetupError: a device's limit is not one of ours, or there was no free device in time.
        StageError: the lease was lost while the stage ran.
    """
    with ExitStack() as stack:
        device, slots = _acquired(stack, gpu, stage, devices, lease_seconds)
        if flow_run.id:
            stack.enter_context(_tagged(device.limit))
        get_run_logger().info("%s: holds %s, %d slots", stage, device, slots, extra={"stage": stage})
        try:
            yield device
        except asyncio.CancelledError as error:  # a BaseException; Prefect throws it into this thread
            raise StageError(
                f"holding {device} for {stage}",
                found="its lease could not be renewed, and somebody else may hold the device now",
                expected="a Prefect server that answers, and that keeps leases when it starts again",
                fix="start the run again; for a server that restarts, set PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE "
                "(docs/operations.md, GPU slots); for longer silences raise MODELPRESS_GPU_LEASE_SECONDS",
            ) from error


def _acquired(
    stack: ExitStack, gpu: GpuConfig, stage: str, devices: Sequence[Device], lease_seconds: float
) -> tuple[Device, int]:
    with get_client(sync_client=True) as client:
        fitting = _fitting(gpu, {device: _limit(client, device) for device in devices})
        end, said = time.monotonic() + gpu.wait_seconds, -math.inf
        while True:
            for device, slots in fitting.items():
                if _take(stack, device, slots, lease_seconds):
                    return device, slots
            now = time.monotonic()
            if now >= end:
                raise SetupError(
                    f"waiting for a GPU for {stage}",
                    found=f"none free within {gpu.wait_seconds:g} s: {_holders(client, fitting)}",
                    expected=f"{', '.join(f'{slots} of {device}' for device, slots in fitting.items())}",
                    fix="run it again later, raise gpu.wait_seconds, or state gpu.memory so that runs share a device; "
                    "for slots that nobody holds see docs/operations.md, GPU slots",
                )
            if now - said >= SAY_SECONDS:
                get_run_logger().info("%s: waits for a GPU: %s", stage, _holders(client, fitting))
                said = now
            time.sleep(min(end - now, ROUND_SECONDS * random.uniform(0.5, 1.5)))


def _take(stack: ExitStack, device: Device, slots: int, lease_seconds: float) -> bool:
    """Take slots if they are free."""
    holder = ConcurrencyLeaseHolder(type="flow_run", id=flow_run.id) if flow_run.id else None
    try:
        stack.enter_context(
            # With `strict`, a lease that cannot be renewed ends the stage: nobody computes on a device that it lost.
            concurrency(device.limit, slots, max_retries=0, lease_duration=lease_seconds, strict=True, holder=holder)
        )
    except ConcurrencySlotAcquisitionError as error:
        cause = error.__cause__
        if isinstance(cause, httpx.HTTPStatusError) and cause.response.status_code == LOCKED:
            return False
        raise SetupError(
            f"taking {slots} slots of {device}", found=str(error), fix="look at the limit: prefect gcl inspect"
        ) from error
    return True


def _limit(client: SyncPrefectClient, device: Device) -> GlobalConcurrencyLimitResponse:
    """The device's limit; made where there is none.

    Raises:
        SetupError: it does not hold what it should.
    """
    try:
        found = client.read_global_concurrency_limit_by_name(device.limit)
    except ObjectNotFound:
        with suppress(ObjectAlreadyExists):  # another run made it meanwhile
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=device.limit, limit=device.slots))
        found = client.read_global_concurrency_limit_by_name(device.limit)
    wrong = {
        "it is switched off": not found.active,
        f"{found.limit} slots": found.limit > device.slots,
        f"slots come back by themselves, {found.slot_decay_per_second:g} a second": found.slot_decay_per_second > 0,
    }
    if any(wrong.values()):
        raise SetupError(
            f"reading the concurrency limit of {device}",
            found=", ".join(reason for reason, holds in wrong.items() if holds),
            expected=f"an active limit of at most {device.slots} slots, one for each GiB, without decay",
            fix=f"prefect gcl delete {device.limit}, and the next run makes it; fewer slots keep memory for others",
        )
    return found


def _fitting(gpu: GpuConfig, limits: dict[Device, GlobalConcurrencyLimitResponse]) -> dict[Device, int]:
    """The devices that could hold the need, and the slots that it takes of each.

    Raises:
        ConfigError: none.
    """
    need = math.ceil(gpu.memory / SLOT_BYTES) if gpu.memory else None
    fitting = {device: need or found.limit for device, found in limits.items() if 0 < (need or 1) <= found.limit}
    if not fitting:
        raise ConfigError(
            "looking for a GPU that is large enough",
            found=", ".join(f"{device}, limit {found.limit}" for device, found in limits.items()),
            expected=f"one with {need or 1} GiB",
            fix="lower gpu.memory, or run it where there is a larger one",
        )
    return fitting


def _holders(client: SyncPrefectClient, devices: Sequence[Device] | dict[Device, int]) -> str:
    """Who holds them, by the tag of their flow runs, and how many slots are taken."""
    parts = []
    for device in devices:
        limit = client.read_global_concurrency_limit_by_name(device.limit)
        running = FlowRunFilter(
            tags=FlowRunFilterTags(all_=[device.limit]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.CANCELLING])),
        )
        names = [f"{run.name} ({run.id})" for run in client.read_flow_runs(flow_run_filter=running)]
        who = ", ".join(names) or "no running flow says that it holds it"
        parts.append(f"{device}: {limit.active_slots} of {limit.limit} slots taken; {who}")
    return "; ".join(parts)


@contextmanager
def _tagged(tag: str) -> Iterator[None]:
    """The flow run carries the tag while this is open: who waits can read it, and the UI can filter by it."""
    run_id = flow_run.id
    with get_client(sync_client=True) as client:
        before = client.read_flow_run(run_id).tags
        client.update_flow_run(run_id, tags=[*before, tag])
    try:
        yield
    finally:
        with get_client(sync_client=True) as client:
            now = client.read_flow_run(run_id).tags
            client.update_flow_run(run_id, tags=[one for one in now if one != tag])


@contextmanager
def placed(gpu: GpuConfig | None, stage: str) -> Iterator[None]:
    """Hold a GPU and compute on it while this is open; without a config nothing is asked of anybody."""
    if gpu is None:
        yield
        return
    import torch

    from modelpress.place import Place, pinned

    lease_seconds = read_settings().gpu_lease_seconds
    with ExitStack() as stack:
        device = stack.enter_context(held(gpu, stage, cuda_devices(), lease_seconds))
        stack.enter_context(pinned(Place(torch.device("cuda", device.index), gpu.memory)))
        yield
