"""What a terminal shows of a flow: the stages, and no traceback of an error that says itself what went wrong."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from modelpress.errors import ModelpressError, SetupError
from modelpress.settings import read_settings

START_SECONDS = 120


class ExpectedErrors(logging.Filter):
    """Keeps an error of ours off the console, where whoever started the flow prints it once and with its way out.

    Prefect's own log, and so its UI, still holds it with its traceback.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """False for records of a `ModelpressError`, and for the failed state that repeats it."""
        error = record.exc_info[1] if record.exc_info else None
        repeated = record.getMessage().startswith("Finished in state Failed")
        return not (isinstance(error, ModelpressError) or repeated)


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """What a flow that is started from a terminal needs around it; enter it before a flow is imported.

    Prefect's own server, started where none is configured, gets two minutes instead of 20 seconds: on a busy machine,
    with a new database, it needs them.

    Raises:
        SetupError: that server did not start.
    """
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", str(START_SECONDS))
    quiet()
    try:
        yield
    except RuntimeError as error:
        if "ephemeral Prefect API server" not in str(error):
            raise
        raise SetupError(
            "starting a Prefect server for this run",
            found=f"no answer from it within {os.environ['PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS']} s",
            fix="try again when the machine is less busy, raise PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS, or "
            "start one with 'prefect server start' and set PREFECT_API_URL",
        ) from error


def quiet() -> None:
    """Set up Prefect's logging, and put the filter on every handler that writes to the terminal.

    MLflow's own lines about its pages go: they would stand in what `--json` prints.
    """
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from prefect.logging.configuration import setup_logging

    setup_logging()
    from flows.logs import write_json

    if read_settings().log == "json":
        write_json()
        return  # whoever reads lines by program wants the error among them
    for name in (None, "prefect.flow_runs", "prefect.task_runs"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.addFilter(ExpectedErrors())
