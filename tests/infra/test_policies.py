"""The bucket policies on the real server: each role does its work, and is refused everything else."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest
from botocore.config import Config

from modelpress import keys, load, pointer
from modelpress.canary import tally
from modelpress.cipher import LocalKey, secrets
from modelpress.config import RetentionConfig
from modelpress.errors import AccessDeniedError
from modelpress.housekeeping.collect import collect
from modelpress.housekeeping.retention import retain
from modelpress.stack.prepare import READER
from modelpress.store.s3 import S3Store
from modelpress.store.s3_buckets import let_count, make_bucket
from tests.conftest import ROOT, S3Server
from tests.packs import Pack, assert_same, make_pack

pytestmark = pytest.mark.s3
FOREIGN = {
    "Sid": "Theirs",
    "Effect": "Allow",
    "Principal": {"AWS": ["arn:aws:iam:::user/nobody"]},
    "Action": ["s3:GetObject"],
    "Resource": ["arn:aws:s3:::none/*"],
}


@dataclass(frozen=True)
class Place:
    """A store with policies on it."""

    bucket: str
    open: Callable[[str], S3Store]
    """The store as `owner`, `publisher`, `server`, `rollback` (a server, too) or `collector`."""
    policy: Callable[[], list[dict[str, object]]]
    apply: Callable[[], subprocess.CompletedProcess[str]]


def call(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "infra/s3" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment or None)


@pytest.fixture(scope="module")
def place(s3_server: S3Server) -> Iterator[Place]:
    """A bucket of its own, four users, and the shipped policies for the prefix `models/a`."""
    if s3_server.folder is None:
        pytest.skip("the server is not the session's own: no users can be made on it")
    access = {"owner": s3_server.writer}
    bucket, tag = f"modelpress-policies-{uuid.uuid4().hex[:8]}", uuid.uuid4().hex[:8]
    roles = ("publisher", "server", "rollback", "collector")
    for role in roles:
        made = call("server.py", "user", f"{role}-{tag}", "--folder", str(s3_server.folder))
        assert made.returncode == 0, made.stderr
        shown = dict(line.removeprefix("export ").split("=", 1) for line in made.stdout.splitlines())
        access[role] = (shown["AWS_ACCESS_KEY_ID"], shown["AWS_SECRET_ACCESS_KEY"])
    session = boto3.session.Session(*s3_server.writer, region_name=s3_server.region)
    config = Config(request_checksum_calculation="when_required")
    client = session.client("s3", endpoint_url=s3_server.endpoint, config=config)
    client.create_bucket(Bucket=bucket)
    client.put_bucket_policy(Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": FOREIGN}))

    def apply() -> subprocess.CompletedProcess[str]:
        users = [part for role in roles for part in (f"--{role}", f"arn:aws:iam:::user/{role}-{tag}")]
        users += ["--server", f"arn:aws:iam:::user/rollback-{tag}"]
        return call(
            "policies.py", "apply", "--bucket", bucket, "--prefix", "models/a", *users, **s3_server.environment()
        )

    def opened(role: str) -> S3Store:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ACCESS_KEY_ID", access[role][0])
            patch.setenv("AWS_SECRET_ACCESS_KEY", access[role][1])
            store = S3Store(f"s3://{bucket}/models/a", s3_server.settings())
            list(store.list("packs/"))  # credentials are read at the first request
            return store

    done = apply()
    assert done.returncode == 0, done.stderr
    yield Place(
        bucket, opened, lambda: json.loads(client.get_bucket_policy(Bucket=bucket)["Policy"])["Statement"], apply
    )
    everything = session.resource("s3", endpoint_url=s3_server.endpoint, config=config).Bucket(bucket)
    everything.objects.all().delete()
    for upload in everything.multipart_uploads.all():
        upload.abort()
    everything.delete()


@pytest.fixture(scope="module")
def pack(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """Published by the publisher, with a pointer; beside the store lies an object of someone else's."""
    made = make_pack(tmp_path_factory.mktemp("shards"))
    publisher = place.open("publisher")
    made.publish(publisher)
    pointer.append(publisher, "demo", "champion", made.digest, "promote")
    owner = place.open("owner")
    owner._client.put_object(Bucket=place.bucket, Key="models/private.txt", Body=b"theirs")
    owner.put("work/secret", b"a stage's output")
    secrets.renew(owner, "demo", [LocalKey(b"K" * 32)])
    return made


def test_a_policy_that_stood_there_stays_and_ours_is_replaced(place: Place) -> None:
    before = place.policy()
    assert [statement["Sid"] for statement in before].count("Theirs") == 1
    assert place.apply().returncode == 0
    assert len(place.policy()) == len(before) == 1 + 4 + 3 + 4 + 5


def test_a_publisher_publishes_large_objects_too_and_deletes_nothing(place: Place, pack: Pack, tmp_path: Path) -> None:
    publisher = place.open("publisher")
    assert not list(publisher.list("doctor/")), "the proof of conditional writes is cleaned up"
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(65 * 2**20)  # travels in parts
    blob = keys.blob("0" * 64)
    assert publisher.put(blob, large)
    assert publisher.info(blob) is not None
    assert publisher.info(keys.blob("1" * 64)) is None, "what is not there is not there, and not refused"
    for key in (blob, keys.manifest("demo", pack.digest), keys.pointer("demo", "champion", 1)):
        with pytest.raises(AccessDeniedError, match="s3:DeleteObject"):
            publisher.delete(key)
    with pytest.raises(AccessDeniedError):
        publisher.put("work/x", b"elsewhere in the store")
    with pytest.raises(AccessDeniedError):
        publisher.get("work/secret")


def test_a_server_reads_packs_and_writes_what_it_counts_and_nothing_else(place: Place, pack: Pack) -> None:
    server = place.open("server")
    digest = load.resolve(server, "demo", "champion")
    assert digest == load.resolve(server, "demo", pack.digest[:16]) == pack.digest
    assert_same(load.load_checkpoint(server, "demo", digest)[1], pack.checkpoint)
    assert load.verify(server, "demo", "champion").pack == pack.digest
    tally.write(server, "demo", tally.new("1" * 32, "2" * 32, "loading", []))
    assert tally.read(place.open("publisher"), "demo", "1" * 32).servers == 1
    blob = keys.blob(pack.manifest.shards[0].sha256)
    refused: list[Callable[[], object]] = [
        lambda: server.put(keys.blob("2" * 64), b"x"),
        lambda: server.put(blob, b"overwritten"),
        lambda: server.put(keys.manifest("demo", "3" * 64), b"{}", if_absent=True),
        lambda: pointer.append(server, "demo", "champion", pack.digest, "promote"),
        lambda: server.delete(blob),
        lambda: server.delete(keys.manifest("demo", pack.digest)),
        lambda: server.get("work/secret"),
        lambda: server.info("work/secret"),
        lambda: list(server.list("")),
        lambda: list(server.list("blobs/")),
        lambda: list(server.list("work/")),
    ]
    for number, attempt in enumerate(refused):
        with pytest.raises(AccessDeniedError) as raised:
            attempt()
        assert "give this key the right" in str(raised.value), number
        assert server._where.endpoint in str(raised.value), number
    beside = place.open("server")
    beside._prefix = "models/"
    with pytest.raises(AccessDeniedError):
        beside.get("private.txt")
    assert load.verify(server, "demo", "champion").pack == pack.digest


def test_a_server_that_may_go_back_appends_to_pointers_and_writes_nothing_else(place: Place, pack: Pack) -> None:
    server = place.open("rollback")
    before = pointer.current(server, "demo", "champion")
    assert before is not None
    made = pointer.append(server, "demo", "champion", pack.digest, "rollback", after=before.number, by="anna")
    assert pointer.current(place.open("server"), "demo", "champion") == made
    assert load.verify(server, "demo", "champion").pack == pack.digest
    for attempt in (
        lambda: server.put(keys.blob("7" * 64), b"x"),
        lambda: server.put(keys.manifest("demo", "7" * 64), b"{}", if_absent=True),
        lambda: server.delete(keys.pointer("demo", "champion", made.number)),
        lambda: server.delete(keys.manifest("demo", pack.digest)),
        lambda: server.put(keys.secret("demo", 9), b"x"),
        lambda: server.get("work/secret"),
        lambda: list(server.list("")),
    ):
        with pytest.raises(AccessDeniedError):
            attempt()


def test_a_collector_deletes_blobs_and_reads_none(place: Place, pack: Pack) -> None:
    collector, garbage = place.open("collector"), keys.blob("4" * 64)
    place.open("publisher").put(garbage, b"garbage")
    assert garbage in [info.key for info in collector.list("blobs/")]
    assert load.load_manifest(collector, "demo", pack.digest) == pack.manifest
    for attempt in (
        lambda: collector.get(garbage),
        lambda: collector.put(keys.blob("5" * 64), b"x"),
        lambda: collector.put(keys.pointer("demo", "champion", 2), b"{}", if_absent=True),
        lambda: collector.delete("work/secret"),
        lambda: collector.delete(keys.pointer("demo", "champion", 1)),
        lambda: collector.delete(keys.secret("demo", 1)),
        lambda: collector.delete(keys.decision("demo", pack.digest, "6" * 64)),
    ):
        with pytest.raises(AccessDeniedError):
            attempt()
    time.sleep(1.1)  # what was written in this very second is younger than nothing
    assert collect(collector, delete=True, grace_seconds=0).by_reason()["unreferenced blob"].objects >= 1
    assert place.open("owner").info(garbage) is None
    assert load.verify(place.open("server"), "demo", "champion").pack == pack.digest
    assert place.open("owner").get("work/secret") == b"a stage's output"
    assert len(secrets.history(place.open("server"), "demo")) == 1
    assert retain(collector, RetentionConfig(keep_versions=1, keep_days=0), delete=True).removed == 0


def test_the_shown_policy_is_whole_and_names_whom_it_is_for() -> None:
    shown = call("policies.py", "show", "--bucket", "b", "--server", "arn:aws:iam::1:role/s")
    document = json.loads(shown.stdout)
    assert "$" not in shown.stdout
    assert {statement["Principal"]["AWS"][0] for statement in document["Statement"]} == {"arn:aws:iam::1:role/s"}
    assert document["Statement"][0]["Condition"] == {"StringLike": {"s3:prefix": ["packs/*"]}}
    assert call("policies.py", "show", "--bucket", "b").returncode == 2


def test_the_stack_lets_its_reading_key_count_and_nothing_more(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    if s3_server.folder is None:
        pytest.skip("the server is not the session's own: nothing is known of its users")
    bucket = f"modelpress-counts-{uuid.uuid4().hex[:8]}"

    def opened(role: str) -> S3Store:
        for name, value in s3_server.environment(role).items():
            monkeypatch.setenv(name, value)
        store = S3Store(f"s3://{bucket}/store", s3_server.settings())
        list(store.list("packs/"))  # credentials are read at the first request
        return store

    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    assert make_bucket(bucket, s3_server.settings())
    mine = tally.new("1" * 32, "2" * 32, "loading", [])
    with pytest.raises(AccessDeniedError):
        tally.write(opened("reader"), "demo", mine)
    writer = opened("writer")
    assert let_count(bucket, "store", READER, s3_server.settings())
    assert not let_count(bucket, "store", READER, s3_server.settings()), "a policy that stands there is left alone"
    reader = opened("reader")
    tally.write(reader, "demo", mine)
    tally.write(reader, "demo", mine)
    assert tally.read(writer, "demo", "1" * 32).servers == 1
    for key in (keys.blob("0" * 64), keys.pointer("demo", "champion", 1), "canaries"):
        with pytest.raises(AccessDeniedError):
            reader.put(key, b"x")
    with pytest.raises(AccessDeniedError):
        reader.delete(keys.tally("demo", "1" * 32, "2" * 32))
