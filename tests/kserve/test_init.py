"""KServe's storage initializer: sources, folders that are mount points, and what Kubernetes is told."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import yaml

from modelpress import keys, kserve, load, pointer
from modelpress.errors import ConfigError, CorruptionError, NotFoundError
from modelpress.load.layouts import MANIFEST_NAME
from modelpress.settings import Settings
from modelpress.store import Store
from modelpress.store.local import LocalStore
from tests.conftest import OpenS3, S3Server
from tests.packs import Pack, make_pack, onnx_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return LocalStore(tmp_path / "store")


def publish(store: Store, folder: Path, seed: int = 0, alias: str = "champion") -> Pack:
    pack = make_pack(folder / f"shards{seed}", onnx_checkpoint(seed), name="graph")
    pack.publish(store)
    pointer.append(store, "graph", alias, pack.digest, "promote")
    return pack


def init(*pairs: str | Path, **settings: Any) -> list[str]:
    return kserve.initialise([str(one) for one in pairs], Settings(**settings))


def source(tmp_path: Path, rest: str = "graph?as=triton") -> str:
    return f"modelpress://{tmp_path}/store/{rest}"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("modelpress://b/p/q/name@blue?as=triton", ("s3://b/p/q", "name", "blue", "triton")),
        ("modelpress://b/name?as=onnx", ("s3://b", "name", "champion", "onnx")),
        (f"modelpress://b/n@sha256:{'0' * 64}?as=huggingface", ("s3://b", "n", f"sha256:{'0' * 64}", "huggingface")),
        ("modelpress:///mnt/packs/name@x?as=checkpoint", ("/mnt/packs", "name", "x", "checkpoint")),
    ],
)
def test_sources(uri: str, expected: tuple[str, ...]) -> None:
    assert dataclasses.astuple(kserve.parse_source(uri)) == expected


@pytest.mark.parametrize(
    "uri",
    [
        "s3://b/name?as=onnx",
        "modelpress:name?as=onnx",
        "modelpress://b/?as=onnx",
        "modelpress://b/name",
        "modelpress://b/name?as=tar",
        "modelpress://b/name?as=onnx&as=triton",
        "modelpress://b/name?as=onnx&x=1",
        "modelpress://b/name?as=onnx#x",
        "modelpress://b/UPPER?as=onnx",
        "modelpress:///name?as=onnx",
        "",
    ],
)
def test_what_is_no_source_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError):
        kserve.parse_source(uri)


def test_a_login_in_a_source_is_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        kserve.parse_source("modelpress://key:hunter2@b/name?as=onnx")
    assert "hunter2" not in str(caught.value)


def test_a_mount_point_is_filled_and_filled_again(store: Store, tmp_path: Path) -> None:
    """A container that starts again finds the volume as the one before left it, finished or not."""
    first, second = publish(store, tmp_path), None
    mount = tmp_path / "models"
    (mount / "lost+found").mkdir(parents=True)
    before = mount.stat().st_ino
    (line,) = init(source(tmp_path), mount)
    assert first.digest in line
    made = {path.relative_to(mount).as_posix() for path in mount.rglob("*")}
    assert {"graph/config.pbtxt", "graph/1/model.onnx", "modelpress.json", "lost+found"} <= made
    onnxruntime.InferenceSession(str(mount / "graph/1/model.onnx"), providers=["CPUExecutionProvider"])
    second = publish(store, tmp_path, 1)
    (mount / ".modelpress.partial").mkdir()
    (mount / ".modelpress.partial/half").write_text("cut off")
    (mount / "graph/1/model.onnx").write_text("cut off")
    init(source(tmp_path), mount)
    assert (mount / "modelpress.json").read_bytes() == second.manifest.to_bytes()
    assert {path.relative_to(mount).as_posix() for path in mount.rglob("*")} == made
    assert mount.stat().st_ino == before
    load.pull(store, "graph", second.digest, tmp_path / "pulled", "triton")
    weights = "graph/1/model.onnx.data"
    assert (mount / weights).read_bytes() == (tmp_path / "pulled" / weights).read_bytes()


def test_files_of_someone_else_are_left_alone(store: Store, tmp_path: Path) -> None:
    publish(store, tmp_path)
    mount = tmp_path / "models"
    mount.mkdir()
    (mount / "precious").write_text("kept")
    with pytest.raises(ConfigError, match="'precious' there already"):
        init(source(tmp_path), mount)
    assert [path.name for path in mount.iterdir()] == ["precious"]


def test_damage_leaves_an_empty_folder(store: Store, tmp_path: Path) -> None:
    pack = publish(store, tmp_path)
    key = keys.blob(pack.shards[0].sha256)
    data = bytearray(store.get(key))
    data[-1] ^= 1
    store.put(key, bytes(data))
    with pytest.raises(CorruptionError, match="shard 0"):
        init(source(tmp_path), tmp_path / "models")
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".modelpress"]


def test_several_sources_at_once(store: Store, tmp_path: Path) -> None:
    publish(store, tmp_path)
    other = publish(store, tmp_path, 1, "blue")
    lines = init(source(tmp_path), tmp_path / "models/a", source(tmp_path, "graph@blue?as=onnx"), tmp_path / "models/b")
    assert other.digest in lines[1]
    assert (tmp_path / "models/a/graph/config.pbtxt").is_file()
    assert (tmp_path / "models/b/model.onnx").is_file()
    with pytest.raises(ConfigError, match="no layout"):  # before anything of the first is fetched
        init(source(tmp_path), tmp_path / "models/c", source(tmp_path, "graph"), tmp_path / "models/d")
    assert not (tmp_path / "models/c").exists()
    with pytest.raises(ConfigError, match="pairs"):
        init(source(tmp_path))
    both = (tmp_path / "models/e", tmp_path / "models/x/../e")
    with pytest.raises(ConfigError, match="a folder of its own"):  # the second would take the place of the first
        init(source(tmp_path), both[0], source(tmp_path, "graph@blue?as=onnx"), both[1])
    assert not (tmp_path / "models/e").exists()


def test_an_alias_that_moves_meanwhile_gives_one_pack(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = publish(store, tmp_path), publish(store, tmp_path, 1, "next")
    get, moved = LocalStore.get, []

    def moving(self: LocalStore, key: str, *span: Any) -> bytes:
        if key.startswith(keys.BLOBS) and not moved:
            moved.append(key)
            pointer.append(store, "graph", "champion", second.digest, "promote")
        return get(self, key, *span)

    monkeypatch.setattr(LocalStore, "get", moving)
    init(source(tmp_path, "graph?as=checkpoint"), tmp_path / "models")
    assert moved
    assert load.resolve(store, "graph", "champion") == second.digest
    assert (tmp_path / "models/modelpress.json").read_bytes() == first.manifest.to_bytes()
    load.pull(store, "graph", first.digest, tmp_path / "pulled", "checkpoint")
    weights = "model.safetensors"
    assert (tmp_path / "models" / weights).read_bytes() == (tmp_path / "pulled" / weights).read_bytes()


def test_an_error_is_one_line_in_both_places(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from modelpress import cli

    log = tmp_path / "termination-log"
    log.touch()
    with pytest.raises(SystemExit) as ended:
        cli.main(["kserve-init", source(tmp_path), str(tmp_path / "models"), "--termination-log", str(log)])
    assert ended.value.code == NotFoundError.exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"error: {log.read_text()}\n"
    assert re.fullmatch(r"resolving graph@champion; found: .*; fix: [^\n]*", log.read_text())
    assert len(kserve.one_line(ConfigError("x", found="é" * 9999)).encode()) <= 4096
    kserve.leave_message("nobody reads it", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.s3
def test_from_a_bucket_with_a_key_that_may_only_read(
    open_s3: OpenS3, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = open_s3("writer")
    pack = publish(written, tmp_path)
    reader = open_s3("reader")  # its keys stand in the environment now; the rest as KServe puts it there
    for ours, theirs in (("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL"), ("S3_REGION", "AWS_DEFAULT_REGION")):
        monkeypatch.setenv(theirs, s3_server.environment()[f"MODELPRESS_{ours}"])
        monkeypatch.delenv(f"MODELPRESS_{ours}")
    uri = written.uri.replace("s3://", "modelpress://")
    settings = kserve.container_settings()
    assert settings.s3_endpoint_url == s3_server.endpoint
    (line,) = kserve.initialise([f"{uri}/graph@champion?as=triton", str(tmp_path / "models")], settings)
    assert pack.digest in line
    assert (tmp_path / "models/graph/1/model.onnx").is_file()
    reader.close()


INIT = """
import sys
blocked = {blocked!r}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
from modelpress.cli import main
main(sys.argv[1:])
"""
LEFT_OUT = [
    *("prefect", "mlflow", "transformers", "captum", "scipy", "sklearn", "matplotlib", "tokenizers", "onnxscript"),
    *("fastapi", "starlette", "uvicorn", "httpx", "orjson", "pandas", "huggingface_hub", "psutil"),
]


def test_the_image_needs_no_more_than_it_installs(store: Store, tmp_path: Path) -> None:
    """What the Dockerfile leaves out of the package's dependencies is not imported."""
    publish(store, tmp_path)
    code = INIT.format(blocked=set(LEFT_OUT))
    command = [sys.executable, "-c", code, "kserve-init", source(tmp_path), str(tmp_path / "models")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "models/graph/config.pbtxt").is_file()
    image = (ROOT / "infra/images/storage-initializer.Dockerfile").read_text()
    assert not [name for name in LEFT_OUT if re.search(rf"\b{name}\b", image)]


def document(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "infra/kubernetes" / name).read_text())
    return found


def test_the_container_takes_our_sources_and_no_others() -> None:
    """By the rule of KServe's `IsStorageUriSupported`: a prefix, or a regular expression found anywhere."""
    made = document("cluster-storage-container.yaml")
    assert (made["apiVersion"], made["kind"]) == ("serving.kserve.io/v1alpha1", "ClusterStorageContainer")
    assert set(made) == {"apiVersion", "kind", "metadata", "spec"}
    spec = made["spec"]
    assert set(spec) == {"container", "supportedUriFormats", "workloadType", "supportsMultiModelDownload"}
    assert spec["workloadType"] == "initContainer"
    container = spec["container"]
    assert container["name"] == "storage-initializer"  # by which KServe knows its own
    assert not {"args", "command"} & set(container)  # KServe gives the arguments
    assert container["securityContext"]["runAsNonRoot"] is True
    assert {"requests", "limits"} == set(container["resources"])

    def supported(uri: str) -> bool:
        return any(
            uri.startswith(one["prefix"]) if "prefix" in one else re.search(one["regex"], uri)
            for one in spec["supportedUriFormats"]
        )

    assert supported("modelpress://b/p/name@champion?as=triton")
    assert not any(map(supported, ("s3://b/p", "https://x/y", "hf://modelpress")))


def test_the_example_asks_for_a_source_that_is_one() -> None:
    made = document("inference-service.yaml")
    assert (made["apiVersion"], made["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    model = made["spec"]["predictor"]["model"]
    found = kserve.parse_source(model["storageUri"])
    assert (found.layout, model["modelFormat"]["name"]) == ("triton", "triton")
    assert json.dumps(made)  # plain values alone


def test_a_container_killed_while_it_clears_the_folder_leaves_no_manifest(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with one is a finished one: it goes before anything that it lists."""
    publish(store, tmp_path)
    mount = tmp_path / "models"
    init(source(tmp_path), mount)
    listed = ("graph", ".modelpress", MANIFEST_NAME)
    monkeypatch.setattr(Path, "iterdir", lambda path: (path / name for name in listed))

    def killed(path: Path, **_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("modelpress.load.layouts.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        init(source(tmp_path), mount)
    assert (mount / "graph").exists()
    assert not (mount / MANIFEST_NAME).exists()
