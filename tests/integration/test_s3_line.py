"""The line on a real S3 server, and the demo's own check of what is served, with a key that may only read."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows import demo
from flows.optimize import optimize
from modelpress import load, pointer
from modelpress.config import load_config
from modelpress.errors import AccessDeniedError
from modelpress.store import open_store
from tests.conftest import ROOT, OpenS3

QUICK = load_config(ROOT / "configs" / "digits-quick.yaml")


@pytest.mark.s3
def test_what_a_writer_published_a_reader_serves_bit_for_bit(
    open_s3: OpenS3,
    prefect_server: str,
    mlflow_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    writer = open_s3("writer")  # its endpoint and its key are in the environment from here on
    environment = {
        "MODELPRESS_HOME": str(tmp_path),
        "MODELPRESS_STORE": f"{writer.uri}/store",
        "MODELPRESS_TRACKING_URI": mlflow_server,
        "PREFECT_API_URL": prefect_server,
        "PREFECT_HOME": str(tmp_path / "prefect"),  # the demo says where its runs can be looked at
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = optimize(QUICK)
    assert result.decision is not None
    assert result.decision.promote, result.decision.line()

    open_s3("reader")
    store = open_store(f"{writer.uri}/store")
    with pytest.raises(AccessDeniedError):
        pointer.append(store, QUICK.name, "champion", result.pack, "promote")
    assert load.verify(store, QUICK.name, "champion").pack == result.pack
    with demo._server([result]) as url:
        demo._predict(url, QUICK, result)
    demo._summarise([result], 1.0)
    shown = capsys.readouterr().out
    assert "equal to the pipeline's own output" in shown
    assert result.pack in shown
    assert f"{result.source_bytes:,} → {result.published_bytes:,}" in shown
    for row in result.stages:
        assert row.stage in shown
