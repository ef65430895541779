"""The rules that hold the house up: which way imports run, what stays light, what never appears."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import httpx
import numpy as np
import pytest

from modelpress.store import open_store
from serving.protocol import decode_response, encode_request
from tests.serving.conftest import CLASSES, WIDTH, publish_pack, scale_model

ROOT = Path(__file__).parents[2]
PACKAGES = ["modelpress", "tasks", "flows", "registry", "serving"]
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

PICKLES = re.compile(
    r"(c?[Pp]ickle|_pickle|cloudpickle|joblib|dill|shelve|torch\.(load|save)|mlflow\.(pytorch|sklearn|pyfunc))(\.|$)"
)

BLOCKED_IMPORT = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
import {module}
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_imports_run_one_way() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", ["modelpress.config", "modelpress.reports", "modelpress.errors"])
def test_light_modules_import_without_torch_and_numpy(module: str) -> None:
    done = run_python(BLOCKED_IMPORT.format(blocked={"torch", "numpy", "onnx", "onnxruntime", "boto3"}, module=module))
    assert done.returncode == 0, done.stderr


def test_form_schema_builds_without_torch() -> None:
    done = run_python(BLOCKED_IMPORT.format(blocked={"torch", "onnx", "onnxruntime"}, module="flows.optimize"))
    assert done.returncode == 0, done.stderr


def test_serving_starts_without_prefect_and_mlflow() -> None:
    done = run_python(BLOCKED_IMPORT.format(blocked={"prefect", "mlflow"}, module="serving.main"))
    assert done.returncode == 0, done.stderr


def test_a_request_is_answered_without_prefect_and_mlflow(tmp_path: Path) -> None:
    """A process that cannot import them starts the server, and a request over HTTP is answered."""
    store = open_store(str(tmp_path / "store"))
    publish_pack(store, tmp_path, scale_model(2.0), "scale")
    start = "from serving.main import main; sys.exit(main())"
    code = BLOCKED_IMPORT.format(blocked={"prefect", "mlflow"}, module="serving.main") + start
    environment = {"MODELPRESS_STORE": store.uri, "MODELPRESS_SERVING_MODELS": "scale", "MODELPRESS_SERVING_PORT": "0"}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            lines: list[str] = []
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"listening on (http://\S+?)/v2", line):
                    break
            else:
                pytest.fail("".join(lines))
            body = encode_request({"x": np.ones((1, WIDTH), np.float32)})
            answer = httpx.post(f"{found[1]}/v2/models/scale/infer", content=body, timeout=30)
            assert answer.status_code == 200, answer.text
            assert np.array_equal(decode_response(answer.content)["y"], np.full((1, CLASSES), WIDTH * 2.0))
        finally:
            process.kill()


def test_importing_the_package_loads_nothing_heavy() -> None:
    done = run_python("import sys, modelpress; print(sorted({m.split('.')[0] for m in sys.modules}))")
    assert done.returncode == 0, done.stderr
    loaded = set(re.findall(r"'(\w+)'", done.stdout))
    assert "modelpress" in loaded
    assert not loaded & {"torch", "numpy", "onnx", "onnxruntime", "numba", "boto3", "mlflow", "prefect", "pydantic"}


def pickles(tree: ast.AST) -> list[str]:
    """What in a module reads or writes pickles: imports, torch.load and torch.save, MLflow's flavours, allow_pickle."""
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.append("allow_pickle")
        found += [name for name in names if PICKLES.match(name)]
    return found


MODELS_FROM_CODE = {"registry/loadable.py", "registry/pack_model.py"}
"""May use MLflow's pyfunc, which pickles where it is given an object: they give it a script and load one
(`tests/registry/test_loadable.py` looks at what is written)."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle(path: Path) -> None:
    allowed = "mlflow.pyfunc" if str(path.relative_to(ROOT)) in MODELS_FROM_CODE else "nothing"
    assert not [name for name in pickles(ast.parse(path.read_text())) if not name.startswith(allowed)]


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import joblib",
        "from dill import load",
        "import cloudpickle",
        "torch.load('x')",
        "from torch import load",
        "torch.save(x, 'y')",
        "mlflow.pytorch.log_model(x)",
        "from mlflow import sklearn",
        "import mlflow.pyfunc",
        "np.load(x, allow_pickle=True)",
    ],
)
def test_a_pickle_would_be_found(code: str) -> None:
    assert pickles(ast.parse(code))


@pytest.mark.parametrize("code", ["safetensors.torch.load(x)", "np.load(x, allow_pickle=False)", "import mlflow"])
def test_what_is_no_pickle_is_let_through(code: str) -> None:
    assert not pickles(ast.parse(code))


def test_dependencies_are_declared_once_and_peers_are_optional() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {re.split(r"[^\w.-]", item)[0] for item in project["dependencies"]}
    peers = {re.split(r"[^\w.-]", item)[0] for item in project["optional-dependencies"]["peers"]}
    assert not required & peers
