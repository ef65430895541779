"""The stages that make a pack known and put it in service: register, promote, rollback."""

from __future__ import annotations

from collections.abc import Mapping

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from modelpress.config import GateConfig
from modelpress.reports import Report, UploadReport
from modelpress.settings import read_settings
from modelpress.store.base import open_store
from registry import runs, versions
from registry.gates import Decision
from tasks.progress import StageProgress
from tasks.runner import RunContext


class Registered(Report):
    """The model version that carries a pack."""

    number: str
    """The version."""
    created: bool
    """Whether it was made now."""


@task(name="register", task_run_name="register", cache_policy=NO_CACHE)
def register(
    context: RunContext, published: UploadReport, origin: Mapping[str, str], measured: Mapping[str, str]
) -> Registered:
    """Register the pack as a model version; one that carries it already keeps its origin and takes the numbers."""
    settings = read_settings()
    with runs.child_run(settings, context.mlflow_run, "register", {}) as child:
        version, created = versions.register(
            child.client,
            context.name,
            pack=published.pack,
            uri=published.uri,
            run_id=context.mlflow_run,
            tags={**origin, "compression_ratio": f"{published.compression_ratio:.4f}"},
            measured=measured,
            description=f"Pack {published.pack}, {published.published_bytes:,} bytes.",
        )
        child.tag("model_version", version.number)
        child.tag("reused", str(not created).lower())
    what = "registered" if created else "reused"
    get_run_logger().info("register: %s version %s", what, version.number, extra={"stage": "register"})
    return Registered(number=version.number, created=created)


@task(name="promote", task_run_name="promote-{name}", cache_policy=NO_CACHE)
def promote(name: str, pack: str, config: GateConfig | None = None) -> Decision:
    """Judge a published pack on its own bytes, freshly read, and move the alias if it passes."""
    from registry import promotion

    settings = read_settings()
    store = open_store(settings.store_uri, settings)
    with StageProgress("gate") as progress, runs.named_errors(settings.mlflow_uri):
        decision = promotion.promote(store, runs.open_client(settings), name, pack, config, progress)
    get_run_logger().info("gate: %s", decision.line(), extra={"stage": "gate"})
    return decision


@task(name="rollback", task_run_name="rollback-{name}", cache_policy=NO_CACHE)
def rollback(name: str, alias: str, to: str | None) -> str:
    """Point the alias at an earlier pack, and return that pack's digest; a retry of the flow run goes no further."""
    from registry import promotion

    settings = read_settings()
    store = open_store(settings.store_uri, settings)
    token = f"flow-run-{flow_run.id}" if flow_run.id else None
    done = promotion.rollback(store, runs.open_client(settings), name, alias, to, token=token)
    get_run_logger().info("rollback: %s of %s is %s again", alias, name, done.pack, extra={"stage": "rollback"})
    if done.lag:
        get_run_logger().warning("rollback: %s", done.lag, extra={"stage": "rollback"})
    return done.pack


@task(name="find", task_run_name="find-{name}", cache_policy=NO_CACHE)
def find_pack(name: str, candidate: str) -> str:
    """Digest of the pack that an alias, a version number or a digest names."""
    settings = read_settings()
    store = open_store(settings.store_uri, settings)
    runs.check_server(settings.mlflow_uri)
    with runs.named_errors(settings.mlflow_uri):
        return versions.resolve(runs.open_client(settings), store, name, candidate)
