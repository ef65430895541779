"""Runs in MLflow: what is shown of the server's address."""

from __future__ import annotations

from modelpress.settings import Settings
from registry.runs import run_url


def test_the_page_of_a_run_is_shown_without_the_servers_login() -> None:
    """It stands in results, in Prefect and in what is printed."""
    settings = Settings.model_validate({"tracking_uri": "https://name:password@mlflow.example.org/base/"})
    assert run_url(settings, "r", "1") == "https://mlflow.example.org/base/#/experiments/1/runs/r"
