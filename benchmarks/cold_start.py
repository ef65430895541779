"""Bucket → first correct answer over a shaped link: `python -m benchmarks.cold_start [--quick]`, as root on Linux.

It runs in a network namespace of its own, with a Ceph RGW (`infra/s3/`). The kernel shapes the loopback there (`tc`,
HTB: only what comes from the gateway's port; Ceph's own traffic is not held up) to 1 and to 10 Gbit/s. `link` is one
plain connection that reads into warm memory and does nothing else: what the shaped link really carries.

Each system loads in a process of its own, client and all, after its imports; the clock stops at the first answer, which
must be the published model's. CPU seconds are the client's and its children's, the peak RSS is that of the largest of
them (imports included: torch alone takes some 300 MB). `floor` is the coded bytes at the link's rate, and what
modelpress spends after the last tensor: making the session, or filling the module, and the first answer.

`loaded before` is a process that has decoded something, as a server has at a swap; the first decoding of a process also
loads the decoder's loops. numba, which runs them, counts as an import (some 0.4 s of CPU), as torch and boto3 do.
`cached` has the blobs in a local cache.

modelpress checks every digest; nobody else checks any. The files that the peers fetch hold the same tensors raw.
Run:ai's streamer is measured where RUNAI_FOLDER names a folder that it was installed into (`pip install --target`).
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from benchmarks._report import Row, main
from benchmarks.transfer import ROOT, _s5cmd, _server

if TYPE_CHECKING:
    from torch import Tensor

INSIDE = "COLD_START_INSIDE"
MIB = 2**20
GBIT = 1e9 / 8
WIDTH = 2048
OURS = ("modelpress", "modelpress, loaded before", "modelpress, cached")
SYSTEMS = {
    "torch": (*OURS, "boto3", "s5cmd", "runai", "mlflow"),
    "onnx": (*OURS, "boto3", "s5cmd", "mlflow"),
}
NOTE = f"""Random weights of a normal distribution in matrices of {WIDTH} × {WIDTH}, whose coded size is that of trained
weights of the same type (bf16 1.5, fp32 1.2). `× floor`: seconds ÷ (coded bytes ÷ rate + what follows the last tensor).
"""


def measure(quick: bool) -> Iterator[Row]:
    """Rows of a bf16 state dict and of an fp32 ONNX graph, at both rates."""
    layers, repeats = (12, 1) if quick else (48, 2)
    with _server() as environment, tempfile.TemporaryDirectory() as name:
        port = urlsplit(environment["MODELPRESS_S3_ENDPOINT_URL"]).port
        assert port is not None
        target = f"s3://{environment['BENCHMARK_BUCKET']}"
        environment |= {"MODELPRESS_STORE": f"{target}/store", "BENCHMARK_TARGET": target, "OMP_NUM_THREADS": "2"}
        environment |= {"AWS_ENDPOINT_URL": environment["MODELPRESS_S3_ENDPOINT_URL"]}
        environment |= {"MLFLOW_S3_ENDPOINT_URL": environment["MODELPRESS_S3_ENDPOINT_URL"]}
        environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), environment.get("RUNAI_FOLDER", "")])}
        for form in SYSTEMS:
            published = _child(["publish", form, str(layers if form == "torch" else layers // 2), name], environment)
            for gbit in (1, 10):
                _shape(port, gbit)
                yield from _case(form, gbit, published, Path(name), environment, repeats)
                _shape(port, None)


def _case(
    form: str, gbit: int, published: dict[str, float], folder: Path, environment: dict[str, str], repeats: int
) -> Iterator[Row]:
    case = f"{form}, {published['raw_bytes'] / MIB:.0f} MiB raw, {gbit} Gbit/s"
    found: dict[str, list[dict[str, float]]] = {}
    for system in ("link", *SYSTEMS[form]) * repeats:
        work = folder / "work"
        work.mkdir()
        cache = folder / f"cache-{form}-{gbit}"  # filled by the first run with it, which is not counted
        runs = 2 if system.endswith("cached") and not cache.exists() else 1
        for _ in range(runs):
            measured = _child([system, form, str(work), str(cache)], environment)
        if measured:
            found.setdefault(system, []).append(measured)
        shutil.rmtree(work)
    for system in ("link", *SYSTEMS[form]):
        runs_of = found.get(system)

        def middle(metric: str, runs_of: list[dict[str, float]] | None = runs_of) -> float | None:
            return statistics.median(run[metric] for run in runs_of) if runs_of else None

        if system == "link":
            seconds = middle("seconds")
            yield Row(
                case, "link", "carried", "Gbit/s", published["raw_bytes"] * 8 / 1e9 / seconds if seconds else None
            )
            continue
        yield Row(case, system, "bucket to first answer", "s", middle("seconds"))
        yield Row(case, system, "client CPU", "s", middle("cpu"))
        yield Row(case, system, "peak RSS", "MiB", middle("rss"))
        if system.startswith("modelpress") and not system.endswith("cached") and runs_of:
            floor = published["stored_bytes"] / (gbit * GBIT) + statistics.median(run["after"] for run in runs_of)
            yield Row(case, system, "floor", "s", floor)
            yield Row(case, system, "× floor", "1", statistics.median(run["seconds"] for run in runs_of) / floor)
            yield Row(case, system, "compression ratio", "1", published["raw_bytes"] / published["stored_bytes"])


def _shape(port: int, gbit: int | None) -> None:
    """Limit what comes from a port on the loopback of this namespace; None: nothing is."""
    subprocess.run(["tc", "qdisc", "del", "dev", "lo", "root"], check=False, stderr=subprocess.DEVNULL)
    if gbit is None:
        return
    burst = str(max(2**20, int(gbit * GBIT / 250)))  # what comes between two ticks of the slowest kernels
    for command in (
        "qdisc add dev lo root handle 1: htb default 20",
        "class add dev lo parent 1: classid 1:20 htb rate 100gbit quantum 200000",
        f"class add dev lo parent 1: classid 1:10 htb rate {gbit}gbit burst {burst} cburst {burst} quantum 200000",
        f"filter add dev lo parent 1: protocol ip u32 match ip sport {port} 0xffff flowid 1:10",
    ):
        subprocess.run(["tc", *command.split()], check=True)


def _child(task: list[str], environment: dict[str, str]) -> dict[str, float]:
    code = f"from benchmarks.cold_start import work; work(*{task!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def work(system: str, form: str, *arguments: str) -> None:
    """One run in this process; prints what was measured as JSON: nothing where the peer is not here."""
    if system == "publish":
        print(json.dumps(_publish(form, int(arguments[0]), Path(arguments[1]))))
        return
    folder, cache = Path(arguments[0]), arguments[1]
    if system.endswith("cached"):
        os.environ["MODELPRESS_CACHE"] = cache
    if system.endswith("before"):
        from modelpress.codec.__main__ import compile_all

        compile_all()
    load = _LOADERS[system.partition(",")[0]](form, folder)
    if load is None:
        print("{}")
        return
    started, cpu = time.perf_counter(), _cpu()
    after, answer = load()
    seconds = time.perf_counter() - started
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    measured = {"seconds": seconds, "cpu": _cpu() - cpu, "rss": peak / 1024, "after": after}
    if system != "link":
        _check(form, answer)
    print(json.dumps(measured))


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _publish(form: str, layers: int, folder: Path) -> dict[str, float]:
    """The pack, and beside it the raw files that the peers fetch, with the answer that all must give."""
    import numpy as np
    import onnx
    import safetensors.torch
    import torch
    from onnx import TensorProto, helper, numpy_helper

    from modelpress import graph
    from modelpress.checkpoint import Checkpoint
    from modelpress.compress import compress
    from modelpress.config import CompressConfig, ShardConfig
    from modelpress.publish import publish
    from modelpress.reports import SourceReport
    from modelpress.settings import read_settings
    from modelpress.shard import draft_manifest, write_shards
    from modelpress.store import open_store

    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5 for _ in range(layers)]
    raw = folder / f"raw-{form}"
    raw.mkdir()
    if form == "torch":
        checkpoint = Checkpoint("torch", {f"{n}.weight": weight.bfloat16() for n, weight in enumerate(weights)})
        safetensors.torch.save_file(checkpoint.tensors, raw / "model.safetensors")
        answer = _torch_answer(checkpoint.tensors)
    else:
        nodes = [helper.make_node("MatMul", [f"x{n}", f"w{n}"], [f"x{n + 1}"]) for n in range(layers)]
        ends = [helper.make_tensor_value_info(f"x{n}", TensorProto.FLOAT, ["n", WIDTH]) for n in (0, layers)]
        initializers = [numpy_helper.from_array(weight.numpy(), f"w{n}") for n, weight in enumerate(weights)]
        body = helper.make_graph(nodes, "g", ends[:1], ends[1:], initializers)
        model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        checkpoint = graph.split(model)
        onnx.save_model(model, str(raw / "model.onnx"), save_as_external_data=True, location="model.onnx.data")
        answer = _onnx_answer(graph.session(checkpoint, threads=2))
    np.save(folder / "answer.npy", answer)
    coded, _ = compress(checkpoint, CompressConfig(codecs=["planes-huffman"]))
    shards, _ = write_shards(coded, ShardConfig(), folder / f"shards-{form}")
    reports = {"source": SourceReport(parameters=layers * WIDTH**2, size_bytes=1, trained=False)}
    manifest, blobs = draft_manifest(form, coded, shards, reports=reports)
    publish(open_store(read_settings().store_uri), manifest, shards, blobs, source_bytes=1)
    peers = open_store(os.environ["BENCHMARK_TARGET"])
    for file in raw.iterdir():
        peers.put(f"raw/{form}/{file.name}", file)
    peers.put(f"raw/{form}.digest", manifest.digest.encode())
    peers.put(f"raw/{form}.npy", (folder / "answer.npy").read_bytes())
    size = sum(file.stat().st_size for file in raw.iterdir())
    return {"raw_bytes": size, "stored_bytes": manifest.published_bytes}


def _torch_answer(tensors: Mapping[str, Tensor]) -> Any:
    """A module of these tensors, without a copy, and its answer."""
    import torch

    with torch.device("meta"):
        layers = [torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16) for _ in tensors]
        module = torch.nn.Sequential(*layers)
    module.load_state_dict(tensors, assign=True)
    with torch.no_grad():
        return module(torch.ones(1, WIDTH, dtype=torch.bfloat16)).float().numpy()


def _onnx_answer(session: Any) -> Any:
    import numpy as np

    return session.run(None, {"x0": np.ones((1, WIDTH), np.float32)})[0]


def _check(form: str, answer: object) -> None:
    import io

    import numpy as np

    from modelpress.store import open_store

    expected = np.load(io.BytesIO(open_store(os.environ["BENCHMARK_TARGET"]).get(f"raw/{form}.npy")))
    if not np.array_equal(np.asarray(answer), expected):
        raise SystemExit(f"{form}: not the published model's answer")


Load = Callable[[], tuple[float, object]]
Loader = Callable[[str, Path], Load | None]
"""What, after its imports, gives what loads and answers: the seconds after the last tensor, and the answer."""


def _modelpress(form: str, folder: Path) -> Load:
    import numba  # noqa: F401
    import onnxruntime  # noqa: F401
    import torch  # noqa: F401

    from modelpress import graph
    from modelpress import load as loading
    from modelpress.cache import open_cache
    from modelpress.settings import read_settings
    from modelpress.store import open_store

    del folder
    digest = open_store(os.environ["BENCHMARK_TARGET"]).get(f"raw/{form}.digest").decode()

    def load() -> tuple[float, object]:
        store = open_store(read_settings().store_uri)
        if form == "torch":
            tensors = loading.state_dict(store, form, digest)
            started = time.perf_counter()
            answer = _torch_answer(tensors)
        else:
            _, checkpoint = loading.load_checkpoint(store, form, digest, cache=open_cache())
            started = time.perf_counter()
            answer = _onnx_answer(graph.session(checkpoint, threads=2))
        after = time.perf_counter() - started
        return after, answer

    return load


def _fetched(fetch: Callable[[str, list[str], Path], Path]) -> Loader:
    """A peer that fetches files to disk, which are then opened as usual."""

    def loader(form: str, folder: Path) -> Load:
        import onnxruntime
        import safetensors.torch

        names = ["model.safetensors"] if form == "torch" else ["model.onnx", "model.onnx.data"]

        def load() -> tuple[float, object]:
            place = fetch(f"raw/{form}", names, folder)
            if form == "torch":
                answer = _torch_answer(safetensors.torch.load_file(place / names[0]))
            else:
                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads = 2
                session = onnxruntime.InferenceSession(
                    str(place / names[0]), options, providers=["CPUExecutionProvider"]
                )
                answer = _onnx_answer(session)
            return 0.0, answer

        return load

    return loader


def _by_boto3(prefix: str, names: list[str], folder: Path) -> Path:
    import boto3

    client = boto3.client("s3")
    for name in names:
        client.download_file(os.environ["BENCHMARK_BUCKET"], f"{prefix}/{name}", str(folder / name))
    return folder


def _by_s5cmd(prefix: str, names: list[str], folder: Path) -> Path:
    commands = "".join(f'cp "{os.environ["BENCHMARK_TARGET"]}/{prefix}/{name}" "{folder / name}"\n' for name in names)
    command = [str(_s5cmd()), "--endpoint-url", os.environ["MODELPRESS_S3_ENDPOINT_URL"], "run"]
    subprocess.run(command, input=commands, check=True, stdout=subprocess.DEVNULL, text=True)
    return folder


def _by_mlflow(prefix: str, names: list[str], folder: Path) -> Path:
    from mlflow.artifacts import download_artifacts

    del names
    uri = f"{os.environ['BENCHMARK_TARGET']}/{prefix}"
    return Path(download_artifacts(artifact_uri=uri, dst_path=str(folder)))


def _runai(form: str, folder: Path) -> Load | None:
    del folder
    if not os.environ.get("RUNAI_FOLDER"):
        return None
    from runai_model_streamer import SafetensorsStreamer  # type: ignore[import-not-found]

    def load() -> tuple[float, object]:
        uri = f"{os.environ['BENCHMARK_TARGET']}/raw/{form}/model.safetensors"
        with SafetensorsStreamer() as streamer:
            streamer.stream_files([uri])
            # Its tensors share a buffer that it uses again.
            answer = _torch_answer({name: tensor.clone() for name, tensor in streamer.get_tensors()})
        return 0.0, answer

    return load


def _link(form: str, folder: Path) -> Load:
    import boto3

    del folder
    names = ["model.safetensors"] if form == "torch" else ["model.onnx.data"]
    keys = {"Bucket": os.environ["BENCHMARK_BUCKET"], "Key": f"raw/{form}/{names[0]}"}
    url = urlsplit(boto3.client("s3").generate_presigned_url("get_object", Params=keys))

    def load() -> tuple[float, object]:
        buffer = memoryview(bytearray(MIB))
        with socket.create_connection((url.hostname, url.port)) as line:
            line.sendall(
                f"GET {url.path}?{url.query} HTTP/1.1\r\nHost: {url.netloc}\r\nConnection: close\r\n\r\n".encode()
            )
            while line.recv_into(buffer):
                pass
        return 0.0, None

    return load


_LOADERS: dict[str, Loader] = {
    "link": _link,
    "modelpress": _modelpress,
    "boto3": _fetched(_by_boto3),
    "s5cmd": _fetched(_by_s5cmd),
    "mlflow": _fetched(_by_mlflow),
    "runai": _runai,
}


def _enter() -> None:
    """Run again in a network namespace of its own, where the loopback may be shaped."""
    command = ["unshare", "--net", sys.executable, "-m", "benchmarks.cold_start", *sys.argv[1:]]
    if os.geteuid() != 0 or not all(shutil.which(program) for program in ("unshare", "tc", "ip")):
        raise SystemExit("the link is shaped by the kernel: run it as root on Linux, with util-linux and iproute2")
    raise SystemExit(subprocess.run(command, env={**os.environ, INSIDE: "1"}, check=False).returncode)


if __name__ == "__main__":
    if not os.environ.get(INSIDE):
        _enter()
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    main("cold_start", measure, note=NOTE)
