"""The process: settings, one socket, one uvicorn server, a thread that looks."""

from __future__ import annotations

import logging
import socket
from contextlib import ExitStack

import uvicorn

from flows.hooks.app import Looker, create_app
from flows.hooks.deliveries import Deliveries
from flows.hooks.lookers import ByWorker, Here
from flows.hooks.settings import HooksSettings
from modelpress.errors import SetupError
from modelpress.settings import Settings

log = logging.getLogger("modelpress.hooks")


def run(base: Settings, hooks: HooksSettings) -> None:
    """Receive until SIGTERM or SIGINT.

    Raises:
        ConfigError: there is no secret.
        SetupError: the port is in use, deliveries can't be remembered, or the deployment is not there.
    """
    secrets, folder = hooks.secrets(), hooks.folder or base.home / "hooks"
    deliveries = Deliveries(folder / "deliveries.sqlite", hooks.tolerance_seconds)
    with ExitStack() as stack:
        listener = stack.enter_context(_bound(hooks.host, hooks.port))
        looker: Looker
        if hooks.run == "here":
            looker = here = Here(hooks.poll_seconds)
            here.start()
            stack.callback(here.stop)
        else:
            looker = by_worker = ByWorker(hooks.deployment)
            by_worker.check()
        app = create_app(
            looker,
            deliveries,
            secrets,
            tolerance_seconds=hooks.tolerance_seconds,
            max_body_bytes=hooks.max_body_bytes,
        )
        config = uvicorn.Config(
            app, log_config=None, access_log=False, limit_concurrency=hooks.max_connections + 1, lifespan="off"
        )
        log.info("listening on http://%s:%d/mlflow", *listener.getsockname()[:2])
        uvicorn.Server(config).run(sockets=[listener])


def configure_log() -> None:
    """Log lines to stderr."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("uvicorn", "httpx", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _bound(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), backlog=128)
    except OSError as error:
        raise SetupError(
            f"listening on {host}:{port}",
            found=error.strerror or str(error),
            fix="choose another with --port and --host, or end what listens there",
        ) from error
