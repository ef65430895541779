"""The S3 server of the session: a real one, or the tests that need it fail with the reason."""

from __future__ import annotations

import functools
import os

# Before torch is imported, here or in what the tests start. Two processes of tests with a thread for each core wait for
# each other's threads: trainings of a second take twenty.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import signal
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import hypothesis
import pytest
from botocore.config import Config

from modelpress.settings import Settings
from modelpress.store.s3 import S3Store
from tests.databases import Databases
from tests.sharing import pytest_collection, pytest_xdist_make_scheduler

__all__ = ["pytest_collection", "pytest_xdist_make_scheduler"]

hypothesis.settings.register_profile("suite", deadline=None)  # a busy machine is no reason to fail
hypothesis.settings.load_profile("suite")

ROOT = Path(__file__).parents[1]
EXPORTER = "onnxscript._framework_apis.torch_"
"""What torch.onnx asks of onnxscript: a module for each of its releases, of which later ones import from 2.5's."""
STORE = "MODELPRESS_STORE"
PREFIX = "MODELPRESS_TEST_S3_"


@functools.cache
def _keep_signatures(imported: bool) -> None:
    """Let the exporter to ONNX read the signatures of its 500 functions once: else each export takes 0.4 s more."""
    if not imported:
        return
    for module in [module for name, module in sys.modules.items() if name.startswith(EXPORTER)]:
        if "get_torchlib_ops" in vars(module):
            vars(module)["get_torchlib_ops"] = functools.cache(vars(module)["get_torchlib_ops"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of tests with one id pytest-xdist runs one, in silence."""
    twice = [name for name, count in Counter(item.nodeid for item in items).items() if count > 1]
    if twice:
        raise pytest.UsageError(f"several tests have the id of another: {', '.join(twice)}")


def pytest_runtest_setup() -> None:
    _keep_signatures(f"{EXPORTER}2_5" in sys.modules)


@pytest.fixture(autouse=True)
def no_store_is_left_behind() -> Iterator[None]:
    """The command line tells the rest of its process which `--store` it was given; tests run it in theirs."""
    before = os.environ.get(STORE)
    yield
    if before is None:
        os.environ.pop(STORE, None)
    else:
        os.environ[STORE] = before


@dataclass(frozen=True)
class S3Server:
    """Where it is, and its two keys: one that may write, one that may only read."""

    endpoint: str
    region: str
    bucket: str
    writer: tuple[str, str]
    reader: tuple[str, str]
    folder: Path | None = None
    """Where the server keeps its files, when it is the session's own."""

    def restart(self) -> None:
        """Kill the gateway as a power cut would, and start it again."""
        assert self.folder is not None
        os.kill(int((self.folder / "client.rgw.pid").read_text()), signal.SIGKILL)
        command = ["radosgw", "--conf", str(self.folder / "ceph.conf"), "-n", "client.rgw"]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, timeout=60)

    def environment(self, role: str = "writer") -> dict[str, str]:
        """What a process needs to reach it: endpoint and keys."""
        key, secret = self.reader if role == "reader" else self.writer
        return {
            "MODELPRESS_S3_ENDPOINT_URL": self.endpoint,
            "MODELPRESS_S3_REGION": self.region,
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
        }

    def settings(self, **changes: object) -> Settings:
        """Settings that reach it."""
        values = {
            "s3_endpoint_url": self.endpoint,
            "s3_region": self.region,
            "s3_timeout_seconds": 20,
            "s3_attempts": 3,
        }
        return Settings.model_validate(values | changes)


@pytest.fixture(scope="session")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Databases:
    """Migrated databases for this run of tests, which its processes share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "databases"
    folder.mkdir(exist_ok=True)
    return Databases(folder)


OpenS3 = Callable[..., S3Store]


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The server that MODELPRESS_TEST_S3_ENDPOINT names (with _KEY, _SECRET, _READER_KEY, _READER_SECRET, and perhaps
    _BUCKET and _REGION), else a Ceph RGW of the session's own."""
    if os.environ.get(f"{PREFIX}ENDPOINT"):
        yield from _with_bucket({name: value for name, value in os.environ.items() if name.startswith(PREFIX)})
        return
    folder = tmp_path_factory.mktemp("ceph")
    command = [sys.executable, str(ROOT / "infra/s3/server.py"), "run", "--folder", str(folder)]
    # It stops when its standard input closes: also when this process is killed.
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        environment = dict(os.environ)
        while line := process.stdout.readline():
            name, _, value = line.removeprefix("export ").strip().partition("=")
            environment[name] = value
            if name == f"{PREFIX}READER_SECRET":
                break
        else:
            pytest.fail(f"the S3 tests need a server, and none can be had here:\n{process.stderr.read()}")
        try:
            yield from _with_bucket(environment, folder)
        finally:
            process.stdin.close()
            process.wait(60)


def _with_bucket(environment: dict[str, str], folder: Path | None = None) -> Iterator[S3Server]:
    names = ("KEY", "SECRET", "READER_KEY", "READER_SECRET")
    missing = [PREFIX + name for name in names if not environment.get(PREFIX + name)]
    if missing:
        pytest.fail(f"{PREFIX}ENDPOINT is set, and so must be: {', '.join(missing)}")
    key, secret, reader_key, reader_secret = (environment[PREFIX + name] for name in names)
    server = S3Server(
        endpoint=environment[f"{PREFIX}ENDPOINT"],
        region=environment.get(f"{PREFIX}REGION", "us-east-1"),
        bucket=environment.get(f"{PREFIX}BUCKET") or f"modelpress-test-{uuid.uuid4().hex[:12]}",
        writer=(key, secret),
        reader=(reader_key, reader_secret),
        folder=folder,
    )
    config = Config(request_checksum_calculation="when_required", retries={"mode": "standard"})
    resource = boto3.session.Session(key, secret, region_name=server.region).resource(
        "s3", endpoint_url=server.endpoint, config=config
    )
    bucket = resource.Bucket(server.bucket)
    made = not environment.get(f"{PREFIX}BUCKET")
    if made:
        bucket.create()
    try:
        yield server
    finally:
        if made:
            bucket.objects.all().delete()
            for upload in bucket.multipart_uploads.all():
                upload.abort()
            bucket.delete()


@pytest.fixture
def open_s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> OpenS3:
    """Open the same fresh prefix as `writer` or `reader`, with changed settings if asked."""
    prefix = f"t-{uuid.uuid4().hex[:12]}"

    def opened(role: str = "writer", **settings: object) -> S3Store:
        for name, value in s3_server.environment(role).items():
            monkeypatch.setenv(name, value)
        return S3Store(f"s3://{s3_server.bucket}/{prefix}", s3_server.settings(**settings))

    return opened
