from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, OpenS3, S3Server

pytestmark = pytest.mark.faults


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("backend", "stride"), [("local", 1), pytest.param("s3", 7, marks=pytest.mark.s3)])
def test_a_publisher_killed_at_any_moment_leaves_no_half_pack(
    backend: str, stride: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    uri, environment = str(tmp_path / "store"), {}
    if backend == "s3":
        open_s3: OpenS3 = request.getfixturevalue("open_s3")
        server: S3Server = request.getfixturevalue("s3_server")
        uri, environment = open_s3("writer").uri, server.environment()
    done = run(["-m", "tests.faults.killed_publisher", uri, str(tmp_path), str(stride)], **environment)
    assert done.returncode == 0, done.stderr + done.stdout
    moments = re.search(r"killed up to moment (\d+)", done.stdout)
    assert moments is not None
    assert int(moments[1]) >= 20


FULL = """
import resource, sys
from pathlib import Path
from modelpress.errors import StoreFullError
from modelpress.load import pull
from modelpress.store.local import LocalStore
from tests.packs import make_pack

folder = Path(sys.argv[1])
pack = make_pack(folder / "shards")
good, full = LocalStore(folder / "good"), LocalStore(folder / "full")
pack.publish(good)
if sys.argv[2] == "limit":
    # No file may grow beyond this: the write of the larger shards fails as it does on a full disk (EFBIG).
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))

def refuses(work):
    try:
        work()
    except StoreFullError as error:
        assert "free space" in str(error), error
    else:
        raise SystemExit("it went through")

refuses(lambda: pack.publish(full))
assert list(full.list("packs/")) == []
for info in full.list("blobs/"):  # what is visible is whole
    assert full.get(info.key) == good.get(info.key)
assert list((full.folder / ".incoming").iterdir()) == []
refuses(lambda: good.download("blobs/sha256/" + pack.shards[0].sha256, folder / "full" / "copy"))
refuses(lambda: pull(good, "demo", pack.digest, folder / "full" / "pulled"))
assert not [path for path in (folder / "full").rglob("*") if "partial" in path.name or path.name in ("copy", "pulled")]

if sys.argv[2] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    before = len(list(full.list("blobs/")))  # how many got through before the first failure is the threads' luck
    report = pack.publish(full)
    assert report.pack == pack.digest and report.sent_objects == report.objects - before
print("held")
"""


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    done = run(["-c", FULL, str(tmp_path), "limit"])
    assert done.stdout == "held\n", done.stderr


def test_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    namespace = ["unshare", "--map-root-user", "--user", "--mount"]
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this kernel gives no user namespace for a small disk; the limit on file size is tested above")
    script = 'mount -t tmpfs -o size=40k none "$1" && shift && exec "$@"'
    done = subprocess.run(
        [
            *namespace,
            "sh",
            "-c",
            script,
            "sh",
            str(tmp_path / "full"),
            sys.executable,
            "-c",
            FULL,
            str(tmp_path),
            "disk",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "held\n", done.stderr
