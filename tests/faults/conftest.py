"""A store behind a line that can be broken."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from modelpress.store import s3_multipart
from modelpress.store.s3 import S3Store
from tests.conftest import OpenS3, S3Server
from tests.faults.proxy import FaultProxy
from tests.packs import Pack, make_pack

MIB = 2**20
QUICK = {"s3_timeout_seconds": 1.5, "s3_deadline_seconds": 30, "s3_attempts": 4, "s3_backoff_seconds": 0.01}
SMALL_PART = 5 * MIB
"""The least that S3 allows; tests count parts, not bytes."""


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint) as opened:
        yield opened


@pytest.fixture
def through(open_s3: OpenS3, proxy: FaultProxy) -> Iterator[S3Store]:
    with closing(open_s3("writer", s3_endpoint_url=proxy.endpoint, **QUICK)) as store:
        yield store


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelpress.store.s3.MULTIPART_BYTES", SMALL_PART)
    monkeypatch.setattr(s3_multipart, "PART_BYTES", SMALL_PART)


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pack, Pack]:
    folder = tmp_path_factory.mktemp("packs")
    return make_pack(folder / "before"), make_pack(folder / "after", max_shard=20_000)


def file_of(folder: Path, size: int) -> tuple[Path, str]:
    path = folder / "data"
    path.write_bytes(os.urandom(size))
    return path, hashlib.sha256(path.read_bytes()).hexdigest()
