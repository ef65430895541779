"""`python -m tests.stack.driver FOLDER PARTS.json`: a supervisor over small programs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from modelpress.stack.layout import Chosen, Folder
from modelpress.stack.supervisor import Part, Policy, Supervisor


def main() -> None:
    folder, spec = Folder(Path(sys.argv[1])), json.loads(Path(sys.argv[2]).read_text())
    chosen = folder.read_chosen()
    assert isinstance(chosen, Chosen)
    parts = [Part(**{**part, "command": tuple(part["command"])}) for part in spec["parts"]]
    with folder.locked() as lock:
        assert lock is not None
        ok = Supervisor(folder, chosen.identity, parts, Policy(**spec["policy"])).run()
    sys.exit(0 if ok else 3)


if __name__ == "__main__":
    main()
