"""The stages that make a pack known and put it in service: register, promote, rollback."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

from mlflow.entities import LoggedModel, Metric
from prefect import task
from prefect.artifacts import create_link_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from modelpress.config import GateConfig
from modelpress.reports import Override, Report, UploadReport
from modelpress.settings import read_settings
from modelpress.store.base import open_store
from registry import datasets, runs, versions
from registry.gates import Approval, Decision
from registry.lineage import Lineage
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
    context: RunContext,
    published: UploadReport,
    lineage: Lineage,
    measured: Mapping[str, str],
    of_hardware: Mapping[str, str] | None = None,
) -> Registered:
    """Register the pack as a model version that MLflow can load; one that carries it already keeps its origin and takes
    the numbers, and what was measured on which class of machines (`registry.figures`)."""
    from registry.loadable import log_pack
    from registry.pack_model import PackConfig

    settings = read_settings()
    with runs.child_run(settings, context.mlflow_run, "register", {}) as child:

        def log() -> LoggedModel:
            store = open_store(settings.store_uri, settings)
            config = PackConfig(name=context.name, pack=published.pack, uri=published.uri)
            model = log_pack(child.client, child.experiment_id, context.mlflow_run, store, config, lineage.tags())
            _log_measured(child, context.mlflow_run, model.model_id, measured)
            return model

        version, created = versions.register(
            child.client,
            context.name,
            pack=published.pack,
            uri=published.uri,
            run_id=context.mlflow_run,
            tags={**lineage.tags(), "compression_ratio": f"{published.compression_ratio:.4f}"},
            measured={**measured, **(of_hardware or {})},
            description=lineage.describe(published),
            log=log,
        )
        page = runs.version_url(settings, context.name, version.number)
        links = {"pack": published.pack, "model_version": f"{context.name}/{version.number}", "model_version_url": page}
        child.tags({**links, "reused": str(not created).lower()})
        runs.Run(child.client, context.mlflow_run, child.experiment_id).tags({**links, "pack_uri": published.uri})
    create_link_artifact(
        link=page,
        link_text=f"{context.name}, version {version.number}",
        key=f"{re.sub(r'[^a-z0-9]+', '-', context.name)}-version",
        description=f"Pack {published.pack} in the model registry",
    )
    what = "registered" if created else "reused"
    get_run_logger().info("register: %s version %s", what, version.number, extra={"stage": "register"})
    return Registered(number=version.number, created=created)


def _log_measured(child: runs.Run, run_id: str, model_id: str, measured: Mapping[str, str]) -> None:
    """Tell the page of the logged model what was measured of it, on which data."""
    now = int(time.time() * 1000)
    judged = datasets.of_run(child.client, run_id, ["evaluation"])
    name, digest = (judged[0].dataset.name, judged[0].dataset.digest) if judged else (None, None)
    child.client.log_batch(
        child.id,
        metrics=[
            Metric(key, float(value), now, 0, model_id, dataset_name=name, dataset_digest=digest, run_id=child.id)
            for key, value in measured.items()
        ],
    )


@task(name="promote", task_run_name="promote-{name}", cache_policy=NO_CACHE)
def promote(
    name: str,
    pack: str,
    config: GateConfig | None = None,
    approval: Approval | None = None,
    override: Override | None = None,
    move: bool = True,
) -> Decision:
    """Judge a published pack on its own bytes, freshly read; `move` the alias if it passes, or a person overrides."""
    from registry import promotion

    settings = read_settings()
    store = open_store(settings.store_uri, settings)
    with StageProgress("gate") as progress, runs.named_errors(settings.mlflow_uri, runs.right_to_edit(name)):
        client = runs.open_client(settings)
        decision = promotion.promote(
            store, client, name, pack, config, progress, approval=approval, override=override, move=move
        )
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
    with runs.named_errors(settings.mlflow_uri, f"the right to READ the registered model {name!r}"):
        return versions.resolve(runs.open_client(settings), store, name, candidate)
