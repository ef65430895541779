"""What becomes of a process that logs to a worker which is killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CHILD = """
import sys, time
from pathlib import Path
from prefect.logging.handlers import PrefectConsoleHandler
import logging
from flows.logs import outlive_readers

here = Path(sys.argv[1])
outlive_readers()
log = logging.getLogger("test")
log.addHandler(PrefectConsoleHandler(stream=sys.stderr))
log.warning("before")
print("ready", flush=True)
while not (here / "go").exists():
    time.sleep(0.01)
for _ in range(3):
    log.warning("nobody reads this")
    print("nor this", flush=True)
(here / "done").touch()
"""


def test_a_run_goes_on_when_nobody_reads_its_lines_any_more(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    assert "before" in process.stderr.readline()
    process.stdout.close()
    process.stderr.close()
    (tmp_path / "go").touch()
    assert process.wait(60) == 0
    assert (tmp_path / "done").exists()
