"""Debian's packages that tests need and Python's index has not: a database server, a browser."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path


def install(*packages: str) -> str | None:
    """Install packages where that asks nobody: as root, with apt, as in a container of CI's; of several processes, one.

    Returns:
        Why they can't be had here; None where they are there.
    """
    ask = f"apt install {' '.join(packages)}"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return f"not root on a Debian: {ask}"
    with Path(tempfile.gettempdir(), f"modelpress-install-{os.geteuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (["update", "-q"], ["install", "-q", "-y", "--no-install-recommends", *packages]):
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            done = subprocess.run(["apt-get", *command], capture_output=True, text=True, check=False, env=environment)
            if done.returncode:
                return f"apt-get {' '.join(command)} failed: {done.stderr[-500:]}"
    return None
