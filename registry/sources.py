"""Source models that MLflow keeps: a model version, by number or alias, or a run's artifact, as a local folder.

    models:/NAME/VERSION    models:/NAME@ALIAS    runs:/ID/PATH        (each also behind mlflow://)

An alias is resolved to a version once, when a run begins. Files are fetched once into `<home>/models/`, only those that
a Hugging Face folder has; what is there is checked against its digest before it is used. Nothing pickled is fetched.
MLflow tells no digests: a model is known by its name, its files' names and sizes, and the end of its run.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import mlflow.artifacts
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

from modelpress.config import WorkloadConfig
from modelpress.errors import CorruptionError, NotFoundError, WorkloadError
from modelpress.settings import Settings
from modelpress.store.local import local_errors
from registry import runs, versions

PREFIXES = ("mlflow://", "models:/", "runs:/")
VERSION = re.compile(r"models:/([^/@]+)/(\d+)")
ALIAS = re.compile(r"models:/([^/@]+)@([A-Za-z][\w-]*)")
RUN = re.compile(r"runs:/([0-9a-f]{32})/([^/].*)")
SUFFIXES = {".jinja", ".json", ".md", ".model", ".safetensors", ".txt"}
"""Of the files that are fetched; no pickled weights, no code."""
PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}
MODULE = re.compile(r"\d+_\w+")
"""Folder of a module of sentence-transformers, of which the config is fetched: it says how a model pools."""
TOKENIZER = "components/tokenizer"
"""Where MLflow's transformers flavour has it."""
MARK = "source.json"
WAY_OUT = (
    "log the model as a folder: model.save_pretrained(folder), tokenizer.save_pretrained(folder), "
    "MlflowClient().log_artifacts(run_id, folder, 'model'); or with mlflow.transformers.log_model"
)


@dataclass(frozen=True)
class Source:
    """A model of MLflow's in a local folder."""

    uri: str
    """What it is, without an alias: `models:/NAME/VERSION` or `runs:/ID/PATH`."""
    folder: Path
    """A Hugging Face folder."""
    sha256: str
    """Digest of its files."""


def is_mlflow(model: str) -> bool:
    """Whether `workload.model` names a model in MLflow."""
    return model.startswith(PREFIXES)


def pin(settings: Settings, config: WorkloadConfig) -> WorkloadConfig:
    """The config with the version in the place of an alias; any other model stays.

    Raises:
        WorkloadError: not such a name.
        NotFoundError: no such version, alias or run.
        SetupError: MLflow does not answer.
    """
    if not is_mlflow(config.model):
        return config
    uri = config.model.removeprefix("mlflow://")
    runs.check_server(settings.mlflow_uri)
    with runs.named_errors(settings.mlflow_uri, f"the right to READ {uri}"):
        client = runs.open_client(settings)
        if found := ALIAS.fullmatch(uri):
            version = versions.by_alias(client, found[1], found[2])
            if version is None:
                raise NotFoundError(f"looking up {uri} in MLflow", found="no such model or alias")
            uri = f"models:/{version.name}/{version.number}"
        elif found := VERSION.fullmatch(uri):
            versions.by_number(client, found[1], found[2])
        elif not RUN.fullmatch(uri):
            raise WorkloadError(
                f"reading the name {config.model}",
                found=repr(config.model),
                expected="models:/NAME/VERSION, models:/NAME@ALIAS or runs:/ID/PATH",
            )
    return config.model_copy(update={"model": uri})


def fetch(settings: Settings, uri: str) -> Source:
    """The folder of a pinned model, fetched first where it is not there as MLflow has it.

    Raises:
        WorkloadError: no Hugging Face folder with safetensors, or a pickled model; what was logged is named.
        NotFoundError: no such artifact.
        CorruptionError: the local copy is not what was fetched.
        SetupError: MLflow does not answer.
    """
    runs.check_server(settings.mlflow_uri)
    with runs.named_errors(settings.mlflow_uri, f"the right to READ {uri}"), _absent(uri):
        listing, ended = _listing(settings, uri), _ended(settings, uri)
    chosen = _choose(uri, listing)
    facts = [(where, path, listing[path]) for where, path in sorted(chosen.items())]
    key = hashlib.sha256(json.dumps([settings.mlflow_uri, uri, ended, facts]).encode()).hexdigest()
    place = settings.home.absolute() / "models" / key
    if not place.exists():
        _download(settings, uri, facts, place)
    found, stated = _digest(place / "model"), _stated(place)
    if found != stated:
        raise CorruptionError(
            f"reading {uri} from {place}",
            found=f"sha256 {found}",
            expected=f"sha256 {stated}, as it was fetched",
            fix="delete that folder: the model is fetched again",
        )
    return Source(uri, place / "model", found)


def _stated(place: Path) -> str:
    """Digest of a folder's files when they were fetched."""
    try:
        return str(json.loads((place / MARK).read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptionError(
            f"reading {place / MARK}",
            found=f"{type(error).__name__}: {error}"[:200],
            expected="the digest of what was fetched",
            fix=f"delete {place}: the model is fetched again",
        ) from error


def _listing(settings: Settings, uri: str) -> dict[str, int]:
    """Bytes of each file below a URI, by its path there."""
    found: dict[str, int] = {}
    root = _artifact_uri(settings, uri)
    waiting = [""]
    while waiting:
        inside = waiting.pop()
        where = f"{root}/{inside}" if inside else root
        for one in mlflow.artifacts.list_artifacts(where, tracking_uri=settings.mlflow_uri):
            path = str(PurePosixPath(inside) / PurePosixPath(one.path).name)
            if one.is_dir:
                waiting.append(path)
            else:
                found[path] = int(one.file_size or 0)
    if not found:
        raise NotFoundError(f"listing {uri} in MLflow", found=f"no files under {root}")
    return found


def _ended(settings: Settings, uri: str) -> int | None:
    """When the run of a run's artifact ended: one that goes on may write another model of the same size."""
    found = RUN.fullmatch(uri)
    return runs.open_client(settings).get_run(found[1]).info.end_time if found else None


def _artifact_uri(settings: Settings, uri: str) -> str:
    """Where a pinned model's files are; of a version, what it was registered from."""
    found = VERSION.fullmatch(uri)
    if found is None:
        return uri
    client, (name, number) = runs.open_client(settings), found.groups()
    version = versions.by_number(client, name, number)
    if version.pack:
        raise WorkloadError(
            f"reading {uri} as a source model",
            found=f"pack {version.pack} that modelpress published: an ONNX graph, coded",
            expected="a torch model that can be distilled, pruned or exported",
            fix="name the model that the pack was made from: its manifest's lineage says which",
        )
    return str(client.get_model_version_download_uri(name, number)).rstrip("/")


@contextmanager
def _absent(uri: str) -> Iterator[None]:
    """MLflow's word for what is not there."""
    try:
        yield
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        raise NotFoundError(f"looking for {uri} in MLflow", found=str(error)[:300]) from error


def _choose(uri: str, listing: dict[str, int]) -> dict[str, str]:
    """Where a Hugging Face folder's files are, by where they are to stand in it.

    Those beside config.json, the configs of the modules of sentence-transformers, and of the tokenizer of MLflow's
    transformers flavour what is not beside config.json.
    """
    folders = [
        folder
        for folder in ("", "model", "artifacts", "data")
        if _in(folder, "config.json") in listing
        and any(str(PurePosixPath(path).parent) == (folder or ".") and _is_weights(path) for path in listing)
    ]
    if not folders:
        pickled = sorted(path for path in listing if PurePosixPath(path).suffix in PICKLES)
        raise WorkloadError(
            f"reading {uri} as a source model",
            found=f"a pickled model, {pickled[0]}: its loading runs whatever code is in it"
            if pickled
            else f"files {', '.join(sorted(listing)[:8])}",
            expected="a Hugging Face folder: config.json, tokenizer.json, *.safetensors",
            fix=WAY_OUT,
        )
    home, chosen = PurePosixPath(folders[0]), dict[str, str]()
    for path in map(PurePosixPath, listing):
        module = path.name == "config.json" and path.parent.parent == home and MODULE.fullmatch(path.parent.name)
        if path.suffix in SUFFIXES and (path.parent == home or module):
            chosen[str(path.relative_to(home))] = str(path)
    for path in map(PurePosixPath, listing):
        if path.suffix in SUFFIXES and str(path.parent) == TOKENIZER:
            chosen.setdefault(path.name, str(path))
    return chosen


def _in(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _is_weights(path: str) -> bool:
    return path.endswith(".safetensors")


def _download(settings: Settings, uri: str, facts: list[tuple[str, str, int]], place: Path) -> None:
    """Fetch the files into one folder, and give that its name when it is whole.

    Args:
        settings: say where MLflow is.
        uri: the pinned model.
        facts: by file its place in the folder, its path in MLflow and its bytes.
        place: the folder.
    """
    partial = place.with_name(f".{place.name}.{uuid.uuid4().hex}.partial")
    with local_errors(f"fetching {uri} into {partial}", writing=True):
        (partial / "model").mkdir(parents=True)
        try:
            with runs.named_errors(settings.mlflow_uri):
                root = _artifact_uri(settings, uri)
                for where, path, size in facts:
                    got = mlflow.artifacts.download_artifacts(
                        f"{root}/{path}", dst_path=str(partial), tracking_uri=settings.mlflow_uri
                    )
                    _check_size(uri, path, Path(got).stat().st_size, size)
                    target = partial / "model" / where
                    target.parent.mkdir(exist_ok=True)
                    if Path(got) != target:
                        Path(got).rename(target)
            mark = {"uri": uri, "sha256": _digest(partial / "model"), "files": facts}
            (partial / MARK).write_text(json.dumps(mark, indent=1), encoding="utf-8")
            try:
                partial.rename(place)
            except OSError:
                if not place.exists():  # else another process was quicker
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _check_size(uri: str, path: str, found: int, expected: int) -> None:
    if expected and found != expected:
        raise CorruptionError(f"fetching {path} of {uri}", found=f"{found} bytes", expected=f"{expected} bytes")


def _digest(folder: Path) -> str:
    """sha256 (hex) of the names and the contents of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            name = path.relative_to(folder).as_posix()
            digest.update(name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
