"""The tasks that keep the publication store in order."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from modelpress.config import RetentionConfig
from modelpress.housekeeping import collect as collecting
from modelpress.housekeeping import retention
from modelpress.reports import CollectReport, RetainReport
from modelpress.settings import read_settings
from modelpress.store.base import open_store
from tasks.progress import StageProgress


@task(name="retain", task_run_name="retain", cache_policy=NO_CACHE)
def retain(config: RetentionConfig, delete: bool) -> RetainReport:
    """Remove the manifests of versions that no rule keeps, if asked."""
    settings = read_settings()
    with StageProgress("retain") as progress:
        report = retention.retain(open_store(settings.store_uri, settings), config, delete=delete, progress=progress)
    going = [f"{one.name}@{one.pack[:12]}" for one in report.packs if not one.keep]
    get_run_logger().info(
        "retain: %d of %d versions %s%s",
        len(going),
        len(report.packs),
        "went" if delete else "may go",
        f": {', '.join(going[:20])}" if going else "",
        extra={"stage": "retain"},
    )
    return report


@task(name="collect", task_run_name="collect", cache_policy=NO_CACHE)
def collect(grace_hours: float, delete: bool) -> CollectReport:
    """Remove what no pack and no upload under way needs, if asked."""
    settings = read_settings()
    with StageProgress("collect") as progress:
        report = collecting.collect(
            open_store(settings.store_uri, settings),
            delete=delete,
            grace_seconds=grace_hours * 3600,
            abandoned_days=settings.upload_abandoned_days,
            progress=progress,
        )
    for reason, found in report.by_reason().items():
        get_run_logger().info(
            "collect: %s: %s objects, %s bytes %s",
            reason,
            f"{found.objects:,}",
            f"{found.size_bytes:,}",
            "went" if delete else "would go",
            extra={"stage": "collect"},
        )
    return report
