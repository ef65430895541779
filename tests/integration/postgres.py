"""A real PostgreSQL server of a session's own, where the machine has the programs and Python has a driver."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests import apt

START_SECONDS = 60
USER, PASSWORD = "mlflow", "password-of-mlflow"


def lacking() -> str | None:
    """Why there can be none here; None where there can. Its programs are installed where that asks nobody."""
    if _programs() is None and (why := apt.install("postgresql")):
        return f"PostgreSQL's programs are not installed, and can't be: {why}"
    if importlib.util.find_spec("psycopg2") is None:
        return "psycopg2 is not installed; the dev extra brings it"
    return None


@contextmanager
def running(port: int) -> Iterator[str]:
    """The address of an empty database."""
    programs = _programs()
    assert programs is not None
    owner = "postgres" if os.getuid() == 0 else None  # it does not run as root
    folder = Path(tempfile.mkdtemp(prefix="modelpress-postgres-"))  # pytest's own may be entered by root alone
    try:
        (folder / "password").write_text(PASSWORD)
        as_owner: dict[str, Any] = {}
        if owner is not None:
            found, as_owner = pwd.getpwnam(owner), {"user": owner, "group": owner, "extra_groups": []}
            for path in (folder, folder / "password"):
                os.chown(path, found.pw_uid, found.pw_gid)
        files = ["-D", str(folder / "data"), "-U", USER, f"--pwfile={folder / 'password'}"]
        made = [str(programs / "initdb"), *files, "--auth=scram-sha-256", "--no-sync", "--no-locale"]
        subprocess.run([*made, "--encoding=UTF8"], check=True, capture_output=True, cwd=folder, **as_owner)
        options = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"]
        started = [str(programs / "postgres"), "-D", str(folder / "data"), "-p", str(port), *options]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(started, stdout=log, stderr=log, cwd=folder, **as_owner)
        try:
            _wait(programs, port, server, folder / "log")
            yield f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{port}/postgres"
        finally:
            server.terminate()
            server.wait(30)
    finally:
        shutil.rmtree(folder)


def _wait(programs: Path, port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    asked = [str(programs / "pg_isready"), "-h", "127.0.0.1", "-p", str(port), "-q"]
    while subprocess.run(asked, check=False).returncode:
        if server.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"PostgreSQL did not start:\n{log.read_text()}")
        time.sleep(0.1)


def _programs() -> Path | None:
    """The folder of `initdb` and its like: Debian leaves it out of PATH."""
    found = [Path(path).resolve().parent for path in [shutil.which("initdb")] if path]
    found += sorted(path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return next((path for path in found if (path / "pg_isready").exists()), None)
