"""Servers that others wrote, each in an environment of its own, with the same ONNX model.

`python -m benchmarks.serving --make-peers` makes the environments below the folder that MODELPRESS_BENCHMARK_PEERS
names: `FOLDER/mlserver`, `FOLDER/kserve`, `FOLDER/mlflow`. A peer that is not there is not measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks._servers import free_port
from benchmarks.serving.models import Model

START_SECONDS = 120.0
PACKAGES = {
    "mlserver": ["mlserver==1.7.*", "onnxruntime", "uvloop<0.22"],  # with a newer one its workers don't start
    "kserve": ["kserve==0.21.*", "onnxruntime"],
    "mlflow": ["mlflow==3.17.2", "onnx", "onnxruntime"],
}

MLSERVER_CODE = """
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse

class Served(MLModel):
    async def load(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(self.settings.parameters.uri, options)
        self.names = [one.name for one in self.session.get_outputs()]
        return True

    async def predict(self, payload):
        inputs = {one.name: NumpyCodec.decode_input(one) for one in payload.inputs}
        found = self.session.run(None, inputs)
        outputs = [NumpyCodec.encode_output(name, array) for name, array in zip(self.names, found)]
        return InferenceResponse(model_name=self.name, outputs=outputs)
"""
KSERVE_CODE = """
import sys
import onnxruntime
from kserve import InferOutput, InferResponse, Model, ModelServer

class Served(Model):
    def __init__(self, name, path):
        super().__init__(name)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options)
        self.names = [one.name for one in self.session.get_outputs()]
        self.ready = True

    def predict(self, payload, headers=None, response_headers=None):
        found = self.session.run(None, {one.name: one.as_numpy() for one in payload.inputs})
        outputs = []
        for name, array in zip(self.names, found):
            output = InferOutput(name, list(array.shape), "FP32")
            output.set_data_from_numpy(array, binary_data=False)
            outputs.append(output)
        return InferResponse(payload.id or "1", self.name, outputs)

if __name__ == "__main__":
    name, path, port = sys.argv[1:4]
    sys.argv = sys.argv[:1]
    ModelServer(http_port=int(port), enable_grpc=False).start([Served(name, path)])
"""


@dataclass(frozen=True)
class Started:
    """A peer that answers."""

    port: int
    path: str
    body: str
    headers: dict[str, str] = field(default_factory=dict)


def make() -> None:
    """Make the environments; what there is stays."""
    folder = home()
    if folder is None:
        raise SystemExit("name a folder for the environments: MODELPRESS_BENCHMARK_PEERS=/somewhere/peers")
    for name, packages in PACKAGES.items():
        python = folder / name / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)


def home() -> Path | None:
    """Where the environments are."""
    named = os.environ.get("MODELPRESS_BENCHMARK_PEERS")
    return Path(named) if named else None


def names() -> list[str]:
    """All systems: each peer as it comes; MLServer, whose model runs in a process beside by default, also without.

    KServe with several processes pickles its models, and a session of ONNX Runtime can't be.
    """
    return ["mlserver", "mlserver, 1 process", "kserve", "mlflow models serve"]


@contextmanager
def peer(system: str, model: Model, folder: Path) -> Iterator[Started | None]:
    """The peer with the model; None: its environment is not there."""
    kind = system.split(",")[0].split(" ")[0]
    root = home()
    python = root / kind / "bin" / "python" if root is not None else None
    if python is None or not python.exists():
        yield None
        return
    folder.mkdir(parents=True)
    path, port = folder / "model.onnx", free_port()
    model.save(path)
    v2 = Started(port, f"/v2/models/{model.name}/infer", model.request, {"Content-Type": "application/json"})
    if kind == "mlserver":
        command, started = _mlserver(python, folder, model, path, port, processes=1 if "1" in system else None), v2
    elif kind == "kserve":
        (folder / "served.py").write_text(KSERVE_CODE)
        command, started = [str(python), "served.py", model.name, str(path), str(port)], v2
    else:
        command = _mlflow(python, folder, path, port)
        body = json.dumps({"inputs": {name: array.tolist() for name, array in model.inputs.items()}})
        started = Started(port, "/invocations", body, {"Content-Type": "application/json"})
    environment = {"PATH": f"{python.parent}:{os.environ['PATH']}", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    environment |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait(started, process, folder / "log")
        yield started
    finally:
        os.killpg(process.pid, 15)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def _mlserver(python: Path, folder: Path, model: Model, path: Path, port: int, processes: int | None) -> list[str]:
    (folder / "served.py").write_text(MLSERVER_CODE)
    settings: dict[str, Any] = {
        "host": "127.0.0.1",
        "http_port": port,
        "grpc_port": free_port(),
        "metrics_port": free_port(),
        "debug": False,
    }
    # 0 runs the model in the process that answers; by default it is one beside it.
    settings |= {} if processes is None else {"parallel_workers": 0}
    (folder / "settings.json").write_text(json.dumps(settings))
    described = {"name": model.name, "implementation": "served.Served", "parameters": {"uri": str(path)}}
    (folder / "model-settings.json").write_text(json.dumps(described))
    return [str(python.parent / "mlserver"), "start", "."]


def _mlflow(python: Path, folder: Path, path: Path, port: int) -> list[str]:
    code = "import mlflow.onnx, onnx, sys; mlflow.onnx.save_model(onnx.load(sys.argv[1]), sys.argv[2])"
    subprocess.run([str(python), "-c", code, str(path), str(folder / "saved")], check=True, capture_output=True)
    serve = ["models", "serve", "-m", str(folder / "saved"), "-p", str(port), "--env-manager", "local"]
    return [str(python.parent / "mlflow"), *serve]


def _wait(started: Started, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until it answers the request.

    Raises:
        RuntimeError: it does not.
    """
    url, end = f"http://127.0.0.1:{started.port}{started.path}", time.monotonic() + START_SECONDS
    said = ""
    while time.monotonic() < end and process.poll() is None:
        try:
            answer = httpx.post(url, content=started.body.encode("latin-1"), headers=started.headers, timeout=10)
        except httpx.TransportError:
            time.sleep(0.2)
            continue
        if answer.status_code == 200:
            return
        said = answer.text
        time.sleep(0.5)
    raise RuntimeError(f"{log.parent.name} does not answer: {said[:500]}\n{log.read_text()[-3000:]}")
