"""What is served: the digits classifier and the sentence encoder, as packs and as files of ONNX for the peers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from benchmarks._encoder import encoder_config
from modelpress import graph, pointer
from modelpress.checkpoint import Checkpoint
from modelpress.compress import compress
from modelpress.config import CompressConfig, ExportConfig, ShardConfig, WorkloadConfig
from modelpress.export import export
from modelpress.publish import publish
from modelpress.shard import draft_manifest, write_shards
from modelpress.store import Store
from modelpress.workload import load_workload
from serving.protocol import encode_request

FREE_PORT = {"MODELPRESS_SERVING_PORT": "0"}


@dataclass(frozen=True)
class Model:
    """One model, with the one request that is sent to it."""

    name: str
    checkpoint: Checkpoint
    inputs: dict[str, np.ndarray]

    @property
    def request(self) -> str:
        """Of the Open Inference Protocol v2, as JSON; in latin-1."""
        return encode_request(self.inputs).decode("latin-1")

    def binary(self) -> tuple[str, int]:
        """The same with the inputs as bytes behind the JSON, in latin-1, and the length of the JSON."""
        tensors = json.loads(encode_request(self.inputs))["inputs"]
        for tensor in tensors:
            del tensor["data"]
            tensor["parameters"] = {"binary_data_size": self.inputs[tensor["name"]].nbytes}
        header = json.dumps({"inputs": tensors, "parameters": {"binary_data_output": True}}).encode()
        raw = b"".join(self.inputs[tensor["name"]].tobytes() for tensor in tensors)
        return (header + raw).decode("latin-1"), len(header)

    def answer(self) -> list[float]:
        """What it gives, flat."""
        (found, *_) = graph.session(self.checkpoint, threads=1).run(None, self.inputs)
        flat: list[float] = np.asarray(found).ravel().tolist()
        return flat

    def save(self, path: Path) -> None:
        """As one file of ONNX."""
        onnx.save_model(graph.join(self.checkpoint), str(path))


def digits(seed: int = 0) -> Model:
    """The digits classifier, one image. Untrained: the weights do not change the time."""
    workload = load_workload(WorkloadConfig(kind="image-classification", model="digits-cnn", data="digits"))
    torch.manual_seed(seed)
    checkpoint = export(workload.skeleton({}), workload, ExportConfig())[0]
    return Model("digits", checkpoint, {name: tensor.numpy() for name, tensor in workload.example(1).items()})


def encoder() -> Model:
    """all-MiniLM-L6-v2 in float, one text."""
    workload = load_workload(encoder_config(calibration=8, evaluation=8))
    checkpoint = export(workload.source(), workload, ExportConfig())[0]
    return Model("encoder", checkpoint, {name: tensor.numpy() for name, tensor in workload.example(1).items()})


def publish_model(store: Store, folder: Path, model: Model, *, champion: bool = True) -> str:
    """As a pack; its digest."""
    folder.mkdir(parents=True)
    coded, report = compress(model.checkpoint, CompressConfig())
    shards, _ = write_shards(coded, ShardConfig(), folder)
    manifest, blobs = draft_manifest(model.name, coded, shards)
    pack = publish(store, manifest, shards, blobs, source_bytes=report.raw_bytes).pack
    if champion:
        pointer.append(store, model.name, "champion", pack, "promote")
    return pack


@dataclass(frozen=True)
class Running:
    """A server process of ours."""

    host: str
    port: int
    process: subprocess.Popen[str]
    log: list[str]


@contextmanager
def server(store: Store, more: Mapping[str, Any] | None = None, code: str = "") -> Iterator[Running]:
    """`modelpress serve` on the store, on a free port; `more` of its environment, and `code` that runs first."""
    command = [sys.executable, "-c", f"{code}\nfrom serving.main import main\nmain()"]
    given = {name: str(value) for name, value in (more or {}).items()}
    environment = os.environ | FREE_PORT | {"MODELPRESS_STORE": store.uri} | given
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    try:
        assert process.stderr
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"listening on http://(\S+):(\d+)/v2", line):
                break
        else:
            raise RuntimeError("".join(lines))
        threading.Thread(target=lambda: lines.extend(process.stderr or ()), daemon=True).start()
        yield Running(found[1], int(found[2]), process, lines)
    finally:
        process.terminate()
        process.wait(60)
