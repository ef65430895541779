"""How a pack came to be, as it stands on its model version: tags that one can search, and a text that one can read."""

from __future__ import annotations

import re

from modelpress.reports import Report, UploadReport

ROLES = {"source": "teacher", "distill": "student"}
"""Of a run that distills."""


class Lineage(Report):
    """From the source model to what is published, and where more of it is to be read."""

    outputs: dict[str, str]
    """By stage, in the order of the line, sha256 of its output: what the runs of the stages have as `output_sha256`."""
    source_model: str | None = None
    """The model in MLflow that was the source, where it was one: `models:/NAME/VERSION` or `runs:/ID/PATH`."""
    mlflow_run: str
    """Id of the run."""
    mlflow_run_url: str
    """Its page."""
    flow_run_id: str
    """Id of the Prefect flow run."""
    flow_run_url: str
    """Its page; empty where Prefect has none."""

    @property
    def report_uri(self) -> str:
        """The report of the run: table, plots and links."""
        return f"runs:/{self.mlflow_run}/report.md"

    def tags(self) -> dict[str, str]:
        """Text by tag of a model version; `lineage.STAGE` is the digest of a stage's output."""
        tags = {
            "lineage": " → ".join(self.outputs),
            "mlflow_run_url": self.mlflow_run_url,
            "flow_run_id": self.flow_run_id,
            "flow_run_url": self.flow_run_url,
            "report_uri": self.report_uri,
            **{f"lineage.{_slug(stage)}": sha256 for stage, sha256 in self.outputs.items()},
        }
        return tags | ({"source_model": self.source_model} if self.source_model else {})

    def describe(self, published: UploadReport) -> str:
        """Markdown for the page of the model version."""
        roles = ROLES if "distill" in self.outputs else {}
        rows = [
            f"| {stage}{f' ({roles[stage]})' if stage in roles else ''} | `{sha256}` |"
            for stage, sha256 in self.outputs.items()
        ]
        links = [f"[MLflow run]({self.mlflow_run_url})", f"report `{self.report_uri}`"]
        if self.flow_run_url:
            links.insert(1, f"[Prefect flow run]({self.flow_run_url})")
        return "\n".join(
            [
                f"Pack `{published.pack}`, {published.published_bytes:,} bytes, at `{published.uri}`.",
                "",
                "| output of | sha256 |",
                "|---|---|",
                *([f"| MLflow | `{self.source_model}` |"] if self.source_model else []),
                *rows,
                f"| upload | `{published.pack}` |",
                "",
                " · ".join(links),
                "",
                "MLflow has no copy: `mlflow.pyfunc.load_model` fetches it from `MODELPRESS_STORE` and verifies it.",
            ]
        )


def _slug(stage: str) -> str:
    """`source (onnx)` is `source-onnx`: MLflow takes no brackets in a tag's name."""
    return re.sub(r"[^\w.]+", "-", stage).strip("-")
