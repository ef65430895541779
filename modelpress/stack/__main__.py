"""`python -m modelpress.stack FOLDER`: the supervisor. `modelpress up` starts it, and gives it the lock."""

from __future__ import annotations

import sys
from pathlib import Path

from modelpress.errors import ModelpressError, SetupError
from modelpress.stack.control import supervise
from modelpress.stack.layout import Folder


def main() -> None:
    """Supervise until a signal; errors that are ours end it with their text and exit code."""
    folder = Folder(Path(sys.argv[1]))
    try:
        chosen = folder.read_chosen()
        assert chosen is not None, "`modelpress up` wrote it"
        if not supervise(folder, chosen):
            state = folder.read_state()
            sys.stderr.write(f"error: {state.why if state else 'the start failed'}\n")
            sys.exit(SetupError.exit_code)
    except ModelpressError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
