"""What one sees of variants: a table and a plot in Prefect and in MLflow, and a line for each in the log."""

from __future__ import annotations

import base64
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.logging import get_run_logger

from modelpress.reports import VariantsReport
from modelpress.store.local import local_errors
from modelpress.variants import figure
from modelpress.variants import show as rows
from modelpress.variants.expand import Variant
from registry import runs


def say(report: VariantsReport) -> None:
    """The outcome in the log."""
    get_run_logger().info("%s", rows.summary(report))


def show(report: VariantsReport, found: Sequence[Variant], run: runs.Run) -> None:
    """Tables, plot and report of what is known so far; where something failed, that is part of it."""
    key = re.sub(r"[^a-z0-9]+", "-", report.name)
    table = rows.table(report, {one.number: one.label for one in found})
    create_link_artifact(
        link=report.mlflow_url,
        link_text=f"MLflow run {run.id}",
        key=f"{key}-variants-mlflow",
        description="Parameters, table and plot; the variants' own runs are below it",
    )
    create_table_artifact(table, key=f"{key}-variants", description=rows.summary(report))
    run.json("variants.json", report.model_dump(mode="json"))
    run.table("variants_table.json", table)
    run.metrics(rows.metrics(report))
    with tempfile.TemporaryDirectory(prefix="modelpress-") as folder:
        path = Path(folder, "variants.png")
        with local_errors(f"writing the plot into {folder}", writing=True):
            figure.draw(report, path)
            picture = base64.b64encode(path.read_bytes()).decode()
        run.folder(Path(folder))
    text = f"# Variants of {report.name}\n\n{rows.summary(report)}\n\n{rows.markdown(table)}\n"
    seen = f"{text}\n![quality by bytes and by latency](data:image/png;base64,{picture})\n"
    create_markdown_artifact(seen, key=f"{key}-variants-report", description=f"Variants of `{report.name}`")
