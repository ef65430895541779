"""Where a thread computes: what a place says to torch and to ONNX Runtime, and what is left when it is over."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from modelpress.config import DistillConfig, TrainConfig
from modelpress.distill import distill
from modelpress.place import Place, current, pinned, provider_options, resident
from tasks.devices import SLOT_BYTES, Device, cuda_devices
from tests.train.toy import Toy

SECOND = Place(torch.device("meta"), 3 * 2**30)


def test_a_place_is_a_block_of_one_thread() -> None:
    seen: list[Place | None] = []
    with pinned(SECOND):
        assert current() == SECOND
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()
    assert seen == [None]
    assert current() is None


def test_modules_move_there_and_come_back_even_when_the_work_fails() -> None:
    module = nn.Linear(2, 2)
    with resident(module):
        assert module.weight.device.type == "cpu", "without a place they stay"
    module = nn.Sequential(nn.ReLU())  # nothing to move
    with pinned(SECOND), resident(module):
        pass
    module = nn.Linear(2, 2, device="meta")
    with pinned(Place(torch.device("cpu"))), pytest.raises(NotImplementedError), resident(module):
        raise AssertionError("torch has no values to bring")
    assert module.weight.device.type == "meta"


def test_onnxruntime_is_told_the_device_and_its_memory() -> None:
    assert provider_options("CUDAExecutionProvider") == {}
    token = Place(torch.device("cuda", 1), 3 * 2**30)
    from modelpress import place

    reset = place._current.set(token)  # `pinned` would start CUDA
    try:
        assert provider_options("CPUExecutionProvider") == {}
        assert provider_options("CUDAExecutionProvider") == {"device_id": "1", "gpu_mem_limit": str(3 * 2**30)}
        assert provider_options("TensorrtExecutionProvider") == {"device_id": "1"}
    finally:
        place._current.reset(reset)


def test_a_limit_is_named_by_the_device_alone() -> None:
    device = Device("GPU-1a2b/3", "H100", 80 * SLOT_BYTES - 1, 1)
    assert device.limit == "gpu.GPU-1a2b-3", "Prefect refuses a slash"
    assert device.slots == 79


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_student_is_trained_on_the_device_that_is_held_and_comes_back() -> None:
    device = cuda_devices()[-1]
    workload = Toy(lambda width=16: nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)))
    config = DistillConfig(architecture={"width": 8}, train=TrainConfig(epochs=2))
    torch.cuda.reset_peak_memory_stats(device.index)
    with pinned(Place(torch.device("cuda", device.index), SLOT_BYTES)):
        assert torch.cuda.current_device() == device.index
        student, report = distill(workload.source(), workload, config)
        assert torch.cuda.max_memory_allocated(device.index) > 0
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2 * SLOT_BYTES, dtype=torch.uint8, device="cuda")
    assert report.train.updates
    assert {one.device.type for one in student.parameters()} == {"cpu"}
    assert torch.cuda.memory_reserved(device.index) == 0
