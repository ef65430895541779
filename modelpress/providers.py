"""ONNX Runtime's execution providers: their names, what each computes on, and what its machine must tell it.

The one list of them: recipes, the gate, the profile and the server take their choices from here. AMD GPUs are reached
by MIGraphX alone, as ONNX Runtime removed its ROCm provider in 1.23. No model of ours was run on MIGraphX or Vitis AI;
their options are those of ONNX Runtime's sources and of AMD's documentation.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from modelpress.errors import SetupError

Provider = Literal[
    "CPUExecutionProvider",
    "CUDAExecutionProvider",
    "TensorrtExecutionProvider",
    "MIGraphXExecutionProvider",
    "VitisAIExecutionProvider",
]
Kind = Literal["cpu", "cuda", "rocm", "fpga"]

CPU: Provider = "CPUExecutionProvider"
CUDA: Provider = "CUDAExecutionProvider"
TENSORRT: Provider = "TensorrtExecutionProvider"
MIGRAPHX: Provider = "MIGraphXExecutionProvider"
VITIS_AI: Provider = "VitisAIExecutionProvider"


@dataclass(frozen=True)
class About:
    """What there is to know of a provider before it is started."""

    kind: Kind
    """What it computes on, as `profile.kinds` names it."""
    fix: str = ""
    """What a machine where it does not start needs."""
    memory_option: str = ""
    """The option that limits its memory, in bytes; empty: it has none."""
    files: tuple[str, ...] = ()
    """Options that name a file."""
    folders: tuple[str, ...] = ()
    """Options that name a folder."""
    cache_folder: str = ""
    """The option that names the folder of compiled graphs, where they are found by the graph alone."""
    cache_key: str = ""
    """The option that names a model's place in the cache, where there is one; it is set by the model's content."""
    one_row: bool = False
    """Whether it takes graphs of fixed shapes alone: a run then has one row."""


PROVIDERS: Mapping[str, About] = {
    CPU: About("cpu"),
    CUDA: About(
        "cuda",
        "install the CUDA 12 or 13 and cuDNN 9 libraries that this onnxruntime-gpu asks for",
        memory_option="gpu_mem_limit",
    ),
    TENSORRT: About("cuda", "install TensorRT 10 beside CUDA and cuDNN", cache_folder="trt_engine_cache_path"),
    MIGRAPHX: About(
        "rocm",
        "install ROCm and, in place of onnxruntime-gpu, AMD's build of ONNX Runtime (onnxruntime-migraphx)",
        memory_option="migraphx_mem_limit",
        folders=("migraphx_model_cache_dir",),
        cache_folder="migraphx_model_cache_dir",
    ),
    VITIS_AI: About(
        "fpga",
        "install AMD's Vitis AI or Ryzen AI software for the board and, in place of onnxruntime-gpu, the build of ONNX "
        "Runtime that comes with it (onnxruntime-vitisai)",
        files=("config_file", "xclbin"),
        folders=("cache_dir",),
        cache_key="cache_key",
        one_row=True,
    ),
}
"""By name."""


def is_of(kind: Kind, provider: str) -> bool:
    """Whether a provider computes on this kind of processor; an unknown one does not."""
    return provider in PROVIDERS and PROVIDERS[provider].kind == kind


def on_gpu(provider: str) -> bool:
    """Whether a provider computes on a GPU, which stages hold while they use it; an unknown one does not."""
    return is_of("cuda", provider) or is_of("rocm", provider)


def check_options(provider: str, options: Mapping[str, str]) -> None:
    """Refuse options that name a file or a folder that is not there, and a key of the cache.

    Vitis AI only warns of what is not there, and then leaves the graph to the CPU. One key would be that of all models.

    Raises:
        SetupError: the option is named.
    """
    about = PROVIDERS[provider]
    if about.cache_key in options:
        raise SetupError(
            f"starting ONNX Runtime on {provider}",
            found=f"its option {about.cache_key} is set for all models",
            expected="none: each model has a key of its content",
            fix=f"take {about.cache_key} out of MODELPRESS_PROVIDER_OPTIONS",
        )
    for name, value in options.items():
        wanted = "a file" if name in about.files else "a folder" if name in about.folders else ""
        there = os.path.isfile(value) if wanted == "a file" else os.path.isdir(value)
        if wanted and not there:
            raise SetupError(
                f"starting ONNX Runtime on {provider}",
                found=f"its option {name} is {value!r}, which is not there",
                expected=wanted,
                fix=f"make it, or set another {name} in MODELPRESS_PROVIDER_OPTIONS",
            )


def provider_error(provider: str, found: str) -> SetupError:
    """The error of a provider that does not start."""
    about = PROVIDERS.get(provider)
    return SetupError(
        f"starting ONNX Runtime on {provider}",
        found=found,
        expected=f"{provider} in use",
        fix=f"{about.fix if about else 'name a provider that this build has'}, or set the provider to {CPU}",
    )


def check_takes_part(provider: str, takers: Collection[str]) -> None:
    """Refuse a provider that was given no node of a graph: the CPU would compute everything, without a word.

    Args:
        provider: that was asked for.
        takers: who was given nodes; empty where that is not known.

    Raises:
        SetupError: all nodes are elsewhere.
    """
    if takers and provider not in takers:
        raise SetupError(
            f"giving a graph to {provider}",
            found=f"every node of it went to {', '.join(sorted(takers))}",
            expected=f"a part of it on {provider}",
            fix="a graph of operators, types and shapes that it takes (docs/processors.md), or set the provider to "
            f"{CPU}",
        )


def takes_one_row(provider: str) -> bool:
    """Whether a provider runs one row at a time; an unknown one does not."""
    return provider in PROVIDERS and PROVIDERS[provider].one_row
