"""What a terminal shows of a flow: the stages, and no traceback of an error that says itself what went wrong."""

from __future__ import annotations

import logging
import os

from modelpress.errors import ModelpressError


class ExpectedErrors(logging.Filter):
    """Keeps an error of ours off the console, where whoever started the flow prints it once and with its way out.

    Prefect's own log, and so its UI, still holds it with its traceback.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """False for records of a `ModelpressError`, and for the failed state that repeats it."""
        error = record.exc_info[1] if record.exc_info else None
        repeated = record.getMessage().startswith("Finished in state Failed")
        return not (isinstance(error, ModelpressError) or repeated)


def quiet() -> None:
    """Set up Prefect's logging, and put the filter on every handler that writes to the terminal.

    MLflow's own lines about its pages go: they would stand in what `--json` prints.
    """
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from prefect.logging.configuration import setup_logging

    setup_logging()
    for name in (None, "prefect.flow_runs", "prefect.task_runs"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.addFilter(ExpectedErrors())
