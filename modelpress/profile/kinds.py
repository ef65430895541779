"""Kinds of processors that a model could run on, each with a real check of whether it can here.

CUDA and ROCm run by torch and by ONNX Runtime's execution providers. TPUs run torch modules by torch_xla and exported
ones by JAX, and FPGAs run graphs by ONNX Runtime's Vitis AI provider: these two are declared backends. Their checks are
real; no model of ours was run on either.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch

from modelpress.providers import CPU, PROVIDERS, Kind
from modelpress.reports.profile import DeviceKind

TPU_PACKAGES = ("torch_xla", "jax")
"""What trains there (`parallel.backend: xla`), and what runs programs of `modelpress export`."""


def device_kinds(devices: Path = Path("/dev")) -> list[DeviceKind]:
    """What could run a model here; `devices` is where the kernel lists devices."""
    checks: list[Callable[[Path], DeviceKind]] = [_cpu, _cuda, _rocm, _tpu, _fpga]
    return [check(devices) for check in checks]


def _known(kind: Kind) -> list[str]:
    """ONNX Runtime's execution providers for this kind."""
    return [name for name, about in PROVIDERS.items() if about.kind == kind]


def _providers(kind: Kind) -> list[str]:
    """Those of them that this build has."""
    return [name for name in _known(kind) if name in onnxruntime.get_available_providers()]


def _cpu(_: Path) -> DeviceKind:
    return DeviceKind(kind="cpu", usable=True, by=["torch", CPU], found="always there")


def _cuda(devices: Path) -> DeviceKind:
    if torch.version.cuda is None:
        where = "a device is there" if (devices / "nvidia0").exists() else f"no {devices / 'nvidia0'}"
        return DeviceKind(kind="cuda", usable=False, found=f"torch {torch.__version__} is built without CUDA; {where}")
    if not torch.cuda.is_available():
        return DeviceKind(kind="cuda", usable=False, found="torch is built with CUDA, and finds no device or no driver")
    by = ["torch", *_providers("cuda")]
    return DeviceKind(kind="cuda", usable=True, by=by, found=torch.cuda.get_device_name())


def _rocm(devices: Path) -> DeviceKind:
    by = _providers("rocm")
    if torch.version.hip is not None and torch.cuda.is_available():  # torch's ROCm build answers under CUDA's name
        return DeviceKind(kind="rocm", usable=True, by=["torch", *by], found=torch.cuda.get_device_name())
    lacks = []
    if not (devices / "kfd").exists():
        lacks.append(f"no {devices / 'kfd'}, the driver's device")
    if torch.version.hip is None:
        lacks.append(f"torch {torch.__version__} is built without ROCm")
    if not by:
        lacks.append(f"this build of ONNX Runtime lacks {', '.join(_known('rocm'))}")
    usable = bool(by) and (devices / "kfd").exists()
    return DeviceKind(kind="rocm", usable=usable, by=by if usable else [], found="; ".join(lacks) or "a device")


def _tpu(devices: Path) -> DeviceKind:
    found = [path.name for pattern in ("accel*", "vfio/[0-9]*") for path in sorted(devices.glob(pattern))]
    packages = [name for name in TPU_PACKAGES if importlib.util.find_spec(name) is not None]
    lacks = [] if packages else [f"none of {', '.join(TPU_PACKAGES)} is installed"]
    if not found:
        lacks.append(f"no {devices / 'accel0'} and no {devices / 'vfio/0'}")
    usable = bool(packages) and bool(found)
    return DeviceKind(
        kind="tpu", usable=usable, by=packages if usable else [], found="; ".join(lacks) or ", ".join(found)
    )


def _fpga(devices: Path) -> DeviceKind:
    by = _providers("fpga")
    boards = [path.name for path in sorted(devices.glob("dri/renderD*"))] if (devices / "xclmgmt").exists() else []
    boards += [path.name for path in sorted(devices.glob("xclmgmt*"))]
    boards += [path.name for path in sorted(devices.glob("accel/accel*"))]
    lacks = [] if by else [f"this build of ONNX Runtime lacks {', '.join(_known('fpga'))}"]
    if not boards:
        lacks.append(f"no board of the XRT driver under {devices}")
    usable = bool(by) and bool(boards)
    return DeviceKind(kind="fpga", usable=usable, by=by if usable else [], found="; ".join(lacks) or ", ".join(boards))
