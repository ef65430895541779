"""`python -m flows.hooks`: everything from the environment."""

from __future__ import annotations

import sys

from flows.hooks.main import configure_log, run
from flows.hooks.settings import read_settings
from modelpress import settings
from modelpress.errors import ModelpressError

if __name__ == "__main__":
    configure_log()
    try:
        run(settings.read_settings(), read_settings())
    except ModelpressError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
