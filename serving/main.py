"""The process: settings, one socket, one uvicorn server, a graceful end."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from pydantic import Field
from pydantic_settings import SettingsConfigDict
from starlette.routing import Route

from modelpress import settings
from modelpress.cores import usable_cores
from modelpress.doctor import check_provider
from modelpress.errors import ModelpressError, SetupError
from modelpress.nudge import read_secrets
from modelpress.providers import CPU, Provider
from modelpress.settings import Settings
from modelpress.store import open_store
from serving import promote, rollback
from serving.access_settings import AccessSettings
from serving.app import create_app
from serving.audit import Audit
from serving.batching import Bounds
from serving.canary import Canaries
from serving.canary_metrics import CanaryMetrics
from serving.expansion import MAX_JSON_BYTES
from serving.guard import Guard
from serving.heads import heads_within
from serving.infer import MAX_BODY_BYTES, MAX_QUEUE, Limits
from serving.kept import Kept
from serving.keyring import Keyring
from serving.metrics import Metrics
from serving.nudge import Nudges
from serving.repository import Repository
from serving.status import Status
from serving.tensors import MAX_TENSOR_BYTES
from serving.tls import Certificate, Refresher
from serving.tracing import Traces
from serving.watch import Watch

if TYPE_CHECKING:
    from serving.rpc.service import Door

log = logging.getLogger("modelpress.serving")

BACKLOG = 2048
SWITCH_SECONDS = 0.0005
"""How long a thread may keep the interpreter from the others. Python's 5 ms would be added to answers, again and again,
while a new pack is loaded."""


class ServingSettings(AccessSettings):
    """Read from ``MODELPRESS_SERVING_*`` variables; `modelpress serve` has an option for most."""

    model_config = SettingsConfigDict(
        env_prefix="MODELPRESS_SERVING_", frozen=True, extra="ignore", use_attribute_docstrings=True
    )

    models: str = ""
    """Comma-separated `NAME` or `NAME@ALIAS`. Empty: every pack that has a champion, also those to come."""
    host: str = "127.0.0.1"
    """Address to listen on; beyond this machine only with keys, or with `open`."""
    port: int = Field(default=8080, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    grpc_port: int = Field(default=0, ge=0, le=65535)
    """Port for gRPC on the same host, with the same keys and certificate; 0: no gRPC."""
    poll_seconds: float = Field(default=2.0, ge=0)
    """How often the pointers are read; 0 never: then only `load` requests bring a new pack."""
    provider: Provider = CPU
    """ONNX Runtime execution provider; the server does not start where it is not in use."""
    threads: int = Field(default=0, ge=0)
    """Intra-operator threads of an inference; 0 shares the cores that this process may use among the `workers`."""
    workers: int = Field(default=0, ge=0)
    """Inferences at a time; 0 takes the cores that this process may use."""
    max_body_bytes: int = Field(default=MAX_BODY_BYTES, ge=1)
    """A larger request is refused."""
    max_queue: int = Field(default=MAX_QUEUE, ge=0)
    """Requests for inference that may wait beside the `workers` that run; more get 429 with Retry-After, unread.
    Bodies take at most (workers + max_queue) x max_body_bytes of memory."""
    max_tensor_bytes: int = Field(default=MAX_TENSOR_BYTES, ge=1)
    """A larger tensor is refused before memory is taken for it."""
    max_json_bytes: int = Field(default=MAX_JSON_BYTES, ge=1)
    """A request whose JSON would take more memory than this, once it is read, is refused before it is. Small values
    take many times their bytes; binary tensor data take none of it."""
    tenant_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the places of `workers` and `max_queue` that one tenant, the name of a key, may hold at a time."""
    batch_rows: int = Field(default=Bounds.rows, ge=1)
    """Most rows of requests that are run together, where the model's answers allow it; 1 joins nothing."""
    batch_milliseconds: float = Field(default=Bounds.run_seconds * 1e3, gt=0)
    """Rows are joined only while their run is expected to take at most this."""
    batch_delay_milliseconds: float = Field(default=Bounds.delay_seconds * 1e3, ge=0)
    """How long a request may wait for company though a worker is free."""
    max_connections: int = Field(default=1024, ge=1)
    """Connections at a time; more get 503."""
    nudge_secret_file: Path | None = None
    """File with the secret that nudges must be signed with, one a line. Unset: nobody can nudge."""
    keep_folder: Path | None = None
    """Folder for a verified copy of what is served, of this server alone: it starts with that where the store does not
    answer. Unset: none."""
    offline_seconds: float = Field(default=0.0, ge=0)
    """How long the server counts as ready while the store does not answer; 0: for ever."""
    drain_seconds: int = Field(default=30, ge=1)
    """On SIGTERM, how long running requests may take to end. Then inferences that run are finished; nothing that waits
    on the store is."""

    @property
    def inferences(self) -> int:
        """Inferences at a time."""
        return self.workers or usable_cores()

    @property
    def intra_threads(self) -> int:
        """Threads of each: together no more than there are cores, unless so many are asked for."""
        return self.threads or max(1, usable_cores() // self.inferences)


def read_settings(**given: Any) -> ServingSettings:
    """Settings from the environment, with what was `given` (not None) on top.

    Raises:
        ConfigError: a value is not legal; the variable is named.
    """
    return settings.read_as(ServingSettings, "reading the server's settings", **given)


def run(base: Settings, serving: ServingSettings) -> None:
    """Serve until SIGTERM or SIGINT, then answer what runs and return.

    A load that a silent store holds up is abandoned: it is in daemon threads, which the interpreter does not wait for.

    Raises:
        SetupError: the port is in use, the execution provider is not, or the folder for copies can't be used.
        ConfigError: a file of keys, of a certificate or of the nudges' secret can't be used, or everybody would be
            answered, unasked.
        ModelpressError: a named model can't be loaded.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    sources = serving.sources()
    serving.check_reach(serving.host, sources)
    keyring, certificate = Keyring(sources), serving.certificate()
    secret_file = serving.nudge_secret_file
    secrets = read_secrets(secret_file, "MODELPRESS_SERVING_NUDGE_SECRET_FILE") if secret_file else []
    check_provider(serving.provider)
    names = [name.strip() for name in serving.models.split(",") if name.strip()]
    store = open_store(base.store_uri, base)
    kept = Kept(serving.keep_folder, store) if serving.keep_folder else None
    repository = Repository(
        store,
        names,
        provider=serving.provider,
        threads=serving.intra_threads,
        retry_seconds=max(serving.poll_seconds, 1.0),
        kept=kept,
        offline_seconds=serving.offline_seconds,
    )
    nudges = Nudges(repository, secrets)
    if serving.grpc_port:
        with _bound(serving.host, serving.grpc_port):
            pass  # said now, and not after seconds of loading
    with (
        contextlib.closing(store),
        kept or contextlib.nullcontext(),
        contextlib.closing(keyring),
        contextlib.closing(Audit(serving.audit_file)) as audit,
        _bound(serving.host, serving.port) as listener,
    ):
        keyring.start()
        repository.start()
        traces = Traces.wanted()
        with nudges:
            app = application(repository, serving, keyring, audit, traces, certificate, nudges)
            settle()
            _serve(app, serving, listener, certificate)
        if traces is not None:
            traces.close()
    log.info("stopped")


def application(
    repository: Repository,
    serving: ServingSettings,
    keyring: Keyring,
    audit: Audit,
    traces: Traces | None = None,
    certificate: Certificate | None = None,
    nudges: Nudges | None = None,
) -> Guard:
    """All of the server but its sockets.

    Args:
        repository: what is served; `Repository.start` has run.
        serving: limits, and what is switched on.
        keyring: who may ask.
        audit: where it is written down.
        traces: where spans go; None: nowhere.
        certificate: for gRPC; None speaks it in clear.
        nudges: who takes them; None: nobody does.
    """
    workers = serving.inferences
    metrics = Metrics(repository, keyring, workers)
    canaries = Canaries(repository.store, repository, serving.poll_seconds)
    metrics.add(CanaryMetrics(canaries))
    if nudges is not None:
        nudges.listen(lambda _: canaries.look_soon())
    app = create_app(
        repository,
        poll_seconds=serving.poll_seconds,
        workers=workers,
        limits=_limits(serving),
        canaries=canaries,
        routes=[
            Route("/metrics", metrics.endpoint),
            *Status(repository, metrics, keyring, canaries, rollback=serving.rollback).routes(),
            (nudges or Nudges(repository, [])).route(),
            Route(rollback.PATH, rollback.Rollback(repository, serving.rollback).endpoint, methods=["POST"]),
            Route(promote.PATH, promote.Promote(repository, serving.promote).endpoint, methods=["POST"]),
        ],
        rpc=_rpc(serving, Watch(keyring, audit, metrics, traces), certificate),
    )
    return Guard(app, keyring, audit, metrics, traces)


def _serve(app: Guard, serving: ServingSettings, listener: socket.socket, certificate: Certificate | None) -> None:
    # Our own handlers and log; uvicorn's access log costs more than a small inference.
    config = uvicorn.Config(
        app,
        lifespan="on",
        ws="none",
        http=heads_within(serving.head_seconds),
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=serving.max_connections + 1,  # uvicorn refuses the last one
        timeout_graceful_shutdown=serving.drain_seconds,
    )
    config.load()
    config.ssl = certificate.context if certificate else None
    listener.listen(BACKLOG)
    scheme = "https" if certificate else "http"
    log.info("listening on %s://%s:%d/v2", scheme, *listener.getsockname()[:2])
    with _graceful_signals(), _refreshed(certificate):
        server = uvicorn.Server(config)
        server.run(sockets=[listener])
    if not server.started:
        raise SetupError("starting the server", found="an error at its start", fix="see the log above")


def settle() -> None:
    """Take what the start made out of the garbage collector's sight.

    It stays until the end, and under load a full collection would walk all of it about once a second: 0.2 s in which
    nobody is answered, measured with 64 clients.
    """
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def _refreshed(certificate: Certificate | None) -> Iterator[None]:
    """Its files are looked at meanwhile."""
    refresher = Refresher(certificate) if certificate else None
    if refresher is not None:
        refresher.start()
    try:
        yield
    finally:
        if refresher is not None:
            refresher.stop()


def _limits(serving: ServingSettings) -> Limits:
    bounds = Bounds(
        serving.batch_rows, serving.batch_milliseconds / 1e3, delay_seconds=serving.batch_delay_milliseconds / 1e3
    )
    return Limits(
        queue=serving.max_queue,
        body_bytes=serving.max_body_bytes,
        tensor_bytes=serving.max_tensor_bytes,
        json_bytes=serving.max_json_bytes,
        tenant_share=serving.tenant_share,
        bounds=bounds,
    )


def _rpc(serving: ServingSettings, watch: Watch, certificate: Certificate | None) -> Door | None:
    if not serving.grpc_port:
        return None
    from serving.rpc.service import Door  # grpcio is imported where it is asked for

    host = f"[{serving.host}]" if ":" in serving.host else serving.host
    return Door(f"{host}:{serving.grpc_port}", watch, certificate, serving.drain_seconds)


def main() -> None:
    """`python -m serving`: everything from the environment."""
    configure_log()
    try:
        run(settings.read_settings(), read_settings())
    except ModelpressError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


def configure_log() -> None:
    """Log lines to stderr."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that holds the port before seconds are spent on loading; nobody is let in until it listens."""
    doing = f"listening on {host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise SetupError(doing, found=str(error), expected="an address of this machine") from error
    with socket.socket(family, kind, protocol) as listener:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            yield listener
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL):
                raise
            raise SetupError(
                doing, found=error.strerror, fix="choose another with --port and --host, or end what listens there"
            ) from error


@contextlib.contextmanager
def _graceful_signals() -> Iterator[None]:
    """uvicorn ends gracefully on a signal and then raises it again, which would make a clean end look like a kill."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
