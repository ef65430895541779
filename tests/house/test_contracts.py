"""The rules that hold the house up: which way imports run, what stays light, what never appears."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ["modelpress", "tasks", "flows", "registry", "serving"]
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

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


def test_importing_the_package_loads_nothing_heavy() -> None:
    done = run_python("import sys, modelpress; print(sorted({m.split('.')[0] for m in sys.modules}))")
    loaded = set(re.findall(r"'(\w+)'", done.stdout))
    assert not loaded & {"torch", "numpy", "onnx", "onnxruntime", "numba", "boto3", "mlflow", "prefect", "pydantic"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle(path: Path) -> None:
    pickled = r"(?<!safetensors\.)torch\.load\(|\bimport pickle\b|cloudpickle|allow_pickle=True"
    assert not re.search(pickled, path.read_text())


def test_dependencies_are_declared_once_and_peers_are_optional() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {re.split(r"[^\w.-]", item)[0] for item in project["dependencies"]}
    peers = {re.split(r"[^\w.-]", item)[0] for item in project["optional-dependencies"]["peers"]}
    assert not required & peers
