"""Upload and download against s5cmd, obstore and boto3 on one S3 server: `python -m benchmarks.transfer [--quick]`.

The server is the one that MODELPRESS_TEST_S3_ENDPOINT names, else a Ceph RGW on loopback of this run's own (see
`infra/s3/`), which shares the cores with the client. Each measurement is a process of its own; seconds of CPU are
the client's, the start of Python and its imports left out. Where objects travel in both directions, every system has
four in flight; s5cmd's own part concurrency is its default.

`boto3` is its transfer manager as it comes; `boto3, signed` is one plain request per object with its sha256 in
the signature, `boto3, unsigned` the same without. `obstore` sends whole objects, unsigned.

`download` writes files. `into memory` does not: whole objects, into memory that modelpress is given and uses again, as
its loader does, and into what the others allocate.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import queue
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks._report import Row, main
from benchmarks._servers import PREFIX, s3_server

ROOT = Path(__file__).parents[1]
MIB, GIB = 2**20, 2**30
IN_FLIGHT = 4
SYSTEMS = ("modelpress", "boto3", "boto3, signed", "boto3, unsigned", "obstore", "s5cmd")
NOTE = """\
modelpress checks a sha256 of every object in both directions inside the measured time, the others check nothing;
`sha256 alone` is what that takes once, reading the file included. Client and server share the cores and the disk.
"""

IN_MEMORY = ("modelpress", "boto3, unsigned", "obstore")


def measure(quick: bool) -> Iterator[Row]:
    """Rows of all cases."""
    repeats = 2 if quick else 3
    full = [("64 × 8 MiB", 64, 8), ("16 × 64 MiB", 16, 64), ("1 × 1 GiB", 1, 1024)]
    cases = [("16 × 8 MiB", 16, 8), ("4 × 64 MiB", 4, 64)] if quick else full
    with _server() as environment, tempfile.TemporaryDirectory() as name:
        for case, count, size in cases:
            files = _files(Path(name), count, size)
            yield from _case(case, files, Path(name), environment, repeats)
            for file in files:
                file.unlink()


def _case(case: str, files: Sequence[Path], folder: Path, environment: dict[str, str], repeats: int) -> Iterator[Row]:
    total = sum(file.stat().st_size for file in files)
    digests, hashing = {}, []
    for _ in range(repeats):
        started = time.process_time()
        digests = {file.name: _sha256(file) for file in files}
        hashing.append(time.process_time() - started)
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for repeat in range(repeats):
        # Each round starts with another system, so that none has the quiet moments to itself.
        for system in SYSTEMS[repeat % len(SYSTEMS) :] + SYSTEMS[: repeat % len(SYSTEMS)]:
            if not _is_here(system):
                continue
            target = f"s3://{environment['BENCHMARK_BUCKET']}/{uuid.uuid4().hex}"
            back = folder / "back"
            back.mkdir()
            found.setdefault(("upload", system), []).append(_run(system, "upload", target, files, back, environment))
            found.setdefault(("download", system), []).append(
                _run(system, "download", target, files, back, environment)
            )
            if system in IN_MEMORY:
                found.setdefault(("into memory", system), []).append(
                    _run(system, "memory", target, files, back, environment)
                )
            if {file.name: _sha256(file) for file in back.iterdir()} != digests:
                raise SystemExit(f"{system} brought back other bytes")
            shutil.rmtree(back)
            _run("boto3", "delete", target, files, back, environment)
    for direction in ("upload", "download", "into memory"):
        for system in SYSTEMS if direction != "into memory" else IN_MEMORY:
            if direction == "download" and system == "boto3, signed":
                continue  # a download has no payload to sign
            runs = found.get((direction, system))
            speed = statistics.median(total / MIB / wall for wall, _ in runs) if runs else None
            cpu = statistics.median(seconds for _, seconds in runs) * GIB / total if runs else None
            yield Row(f"{direction} {case}", system, "throughput", "MiB/s", speed)
            yield Row(f"{direction} {case}", system, "client CPU", "s/GiB", cpu)
        yield Row(
            f"{direction} {case}", "sha256 alone", "client CPU", "s/GiB", statistics.median(hashing) * GIB / total
        )


def _run(
    system: str, action: str, target: str, files: Sequence[Path], back: Path, environment: dict[str, str]
) -> tuple[float, float]:
    """Wall and CPU seconds of one transfer, in a process of its own."""
    if system == "s5cmd" and action in ("upload", "download"):
        return _run_s5cmd(action, target, files, back, environment)
    task = json.dumps([system, action, target, [str(file) for file in files], str(back)])
    code = f"from benchmarks.transfer import work; work({task!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    wall, cpu = json.loads(done.stdout)
    return wall, cpu


def _run_s5cmd(
    action: str, target: str, files: Sequence[Path], back: Path, environment: dict[str, str]
) -> tuple[float, float]:
    pairs = [
        (str(file), f"{target}/{file.name}") if action == "upload" else (f"{target}/{file.name}", str(back / file.name))
        for file in files
    ]
    commands = "".join(f'cp "{source}" "{destination}"\n' for source, destination in pairs)
    command = [str(_s5cmd()), "--endpoint-url", environment["MODELPRESS_S3_ENDPOINT_URL"]]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [*command, "--numworkers", str(IN_FLIGHT), "run"],
        input=commands,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def work(task: str) -> None:
    """One transfer in this process; prints its wall and CPU seconds as JSON."""
    system, action, target, names, back = json.loads(task)
    each = WORKERS[system](target, action)
    files = [Path(name) for name in names]
    digests = {file: _sha256(file) for file in files}  # as the shard writer knows them
    started, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        list(pool.map(lambda file: each(file, Path(back, file.name), digests[file]), files))
    print(json.dumps([time.perf_counter() - started, time.process_time() - cpu]))


def _modelpress(target: str, action: str) -> Callable[[Path, Path, str], None]:
    from modelpress.store import open_store
    from modelpress.store.receive import memory

    store = open_store(target)

    def upload(file: Path, back: Path, digest: str) -> None:
        del back
        store.put(file.name, file, sha256=digest)

    def download(file: Path, back: Path, digest: str) -> None:
        if store.download(file.name, back) != digest:
            raise SystemExit(f"{file.name} came back with other bytes")

    spare: queue.SimpleQueue[memoryview] = queue.SimpleQueue()

    def into_memory(file: Path, back: Path, digest: str) -> None:
        del back
        size = file.stat().st_size
        buffer = memory(size) if spare.empty() else spare.get()
        found = hashlib.sha256()
        store.read_into(file.name, buffer, 0, found.update)
        if found.hexdigest() != digest:
            raise SystemExit(f"{file.name} came back with other bytes")
        spare.put(buffer)

    return {"upload": upload, "download": download, "memory": into_memory}[action]


def _boto3(target: str, action: str) -> Callable[[Path, Path, str], None]:
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["MODELPRESS_S3_ENDPOINT_URL"])
    bucket, _, prefix = target.removeprefix("s3://").partition("/")

    def transfer(file: Path, back: Path, digest: str) -> None:
        del digest
        key = f"{prefix}/{file.name}"
        if action == "upload":
            client.upload_file(str(file), bucket, key)
        elif action == "download":
            client.download_file(bucket, key, str(back))
        else:
            client.delete_object(Bucket=bucket, Key=key)

    return transfer


def _boto3_plain(target: str, action: str, signed: bool) -> Callable[[Path, Path, str], None]:
    import boto3
    from botocore.config import Config

    config = Config(
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"payload_signing_enabled": signed},
    )

    client = boto3.client("s3", endpoint_url=os.environ["MODELPRESS_S3_ENDPOINT_URL"], config=config)
    bucket, _, prefix = target.removeprefix("s3://").partition("/")

    def transfer(file: Path, back: Path, digest: str) -> None:
        del digest
        key = f"{prefix}/{file.name}"
        if action == "upload":
            with file.open("rb") as body:
                client.put_object(Bucket=bucket, Key=key, Body=body)
        elif action == "memory":
            client.get_object(Bucket=bucket, Key=key)["Body"].read()
        else:
            with back.open("wb") as output:
                for block in client.get_object(Bucket=bucket, Key=key)["Body"].iter_chunks(MIB):
                    output.write(block)

    return transfer


def _obstore(target: str, action: str) -> Callable[[Path, Path, str], None]:
    import obstore

    bucket, _, prefix = target.removeprefix("s3://").partition("/")
    store = obstore.store.S3Store(
        bucket,
        prefix=prefix,
        endpoint=os.environ["MODELPRESS_S3_ENDPOINT_URL"],
        access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
        secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        region=os.environ["AWS_REGION"],
        unsigned_payload=True,
        client_options={"allow_http": True},
    )

    def transfer(file: Path, back: Path, digest: str) -> None:
        del digest
        if action == "upload":
            obstore.put(store, file.name, file, use_multipart=file.stat().st_size > 64 * MIB)
        elif action == "memory":
            obstore.get(store, file.name).bytes()
        else:
            with back.open("wb") as output:
                for block in obstore.get(store, file.name).stream(min_chunk_size=MIB):
                    output.write(block)

    return transfer


WORKERS: dict[str, Callable[[str, str], Callable[[Path, Path, str], None]]] = {
    "modelpress": _modelpress,
    "boto3": _boto3,
    "boto3, signed": lambda target, action: _boto3_plain(target, action, True),
    "boto3, unsigned": lambda target, action: _boto3_plain(target, action, False),
    "obstore": _obstore,
}


def _is_here(system: str) -> bool:
    if system == "s5cmd":
        return _s5cmd() is not None
    return system != "obstore" or importlib.util.find_spec("obstore") is not None


@contextlib.contextmanager
def _server() -> Iterator[dict[str, str]]:
    """The environment in which a process reaches the server and its bucket."""
    if f"{PREFIX}ENDPOINT" in os.environ:
        yield _environment(dict(os.environ))
        return
    with s3_server() as (_, said):
        yield _environment({**os.environ, **said})


def _environment(found: dict[str, str]) -> dict[str, str]:
    import boto3

    if f"{PREFIX}SECRET" not in found:
        raise SystemExit(f"no S3 server: see above, or set {PREFIX}ENDPOINT, {PREFIX}KEY and {PREFIX}SECRET")
    reach = {
        "AWS_ACCESS_KEY_ID": found[f"{PREFIX}KEY"],
        "AWS_SECRET_ACCESS_KEY": found[f"{PREFIX}SECRET"],
        "AWS_DEFAULT_REGION": found.get(f"{PREFIX}REGION", "us-east-1"),
        "AWS_REGION": found.get(f"{PREFIX}REGION", "us-east-1"),
        "MODELPRESS_S3_ENDPOINT_URL": found[f"{PREFIX}ENDPOINT"],
    }
    bucket = found.get(f"{PREFIX}BUCKET")
    if not bucket:
        bucket = f"modelpress-benchmark-{uuid.uuid4().hex[:8]}"
        session = boto3.session.Session(reach["AWS_ACCESS_KEY_ID"], reach["AWS_SECRET_ACCESS_KEY"])
        client = session.client("s3", "us-east-1", endpoint_url=reach["MODELPRESS_S3_ENDPOINT_URL"])
        client.create_bucket(Bucket=bucket)
    return {**found, **reach, "BENCHMARK_BUCKET": bucket}


def _files(folder: Path, count: int, size: int) -> list[Path]:
    block = os.urandom(8 * MIB)
    files = [folder / f"shard-{number:05d}.safetensors" for number in range(count)]
    for number, file in enumerate(files):
        with file.open("wb") as target:
            for turn in range(size // 8):
                cut = (number * 131 + turn * 17) % len(block)
                target.write(block[cut:] + block[:cut])
    return files


def _s5cmd() -> str | None:
    beside = Path(sys.executable).with_name("s5cmd")
    return str(beside) if beside.exists() else shutil.which("s5cmd")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main("transfer", measure, note=NOTE)
