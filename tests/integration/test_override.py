"""A person overrides the gate by the command line: against real servers, and it is told wherever one looks."""

from __future__ import annotations

import json
import os
from pathlib import Path

from mlflow import MlflowClient

from modelpress import decisions, keys, pointer
from modelpress.store.local import LocalStore
from modelpress.trust import Signer
from registry import versions
from tests import warm
from tests.registry.shelf import Shelf
from tests.trust.teams import Team

NAME = "forced"


def test_a_promotion_by_override(tmp_path: Path, prefect_server: str, mlflow_server: str) -> None:
    team = Team(tmp_path, farm="publisher")
    client = MlflowClient(mlflow_server, mlflow_server)
    shelf = Shelf(team.store("farm"), client, tmp_path / "shards", NAME)
    pack = shelf.publish(min_compression_ratio=100_000)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MODELPRESS_", "AWS_"))}
    environment = clean | {
        "MODELPRESS_HOME": str(tmp_path / "home"),
        "MODELPRESS_STORE": str(tmp_path / "store"),
        "MODELPRESS_TRACKING_URI": mlflow_server,
        "MODELPRESS_TRUST": str(team.path),
        "MODELPRESS_SIGNING_KEY_FILE": str(tmp_path / "farm.pem"),
        "PREFECT_API_URL": prefect_server,
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }

    def run(*arguments: str) -> tuple[int, str, str]:
        done = warm.flows().run(*arguments, env=environment)
        return done.returncode, done.stdout, done.stderr

    code, _, err = run("promote", NAME, pack)
    assert code == 9, err
    assert "at least 100000× is asked" in err
    assert pointer.current(team.store(), NAME, "champion") is None

    code, out, err = run("promote", NAME, pack, "--override", "the old one leaks", "--by", "Anna")
    assert code == 0, err
    assert "forced: promoted (fail, overridden by Anna: the old one leaks); quality against the source: pass" in out
    entry = pointer.current(team.store(), NAME, "champion")
    assert entry is not None
    assert (entry.pack, entry.reason) == (pack, "override")
    assert entry.decision is not None
    record = decisions.read(team.store(), NAME, pack, entry.decision[decisions.RECORD])
    assert record.decision.override is not None
    assert (record.decision.override.by, record.decision.override.reason) == ("Anna", "the old one leaks")
    tags = versions.carrying(client, NAME, pack).tags
    assert tags["gate.override"] == "overridden by Anna: the old one leaks"
    assert (tags["gate.verdict"], tags["gate.promote"], tags["gate.decision"]) == ("fail", "true", record.digest)

    assert "fail, overridden by Anna: the old one leaks" in run("history", NAME)[1]
    code, out, _ = run("decisions", NAME, "--json")
    found = json.loads(out)
    promotes = [(one["problem"], one["record"]["decision"]["promote"]) for one in found]
    assert promotes == [(None, True), (None, False)]  # newest first
    told = run("decisions", f"{NAME}@champion")[1]
    assert told.count("compression ratio: fail, ") == 2
    assert sum(line.rstrip().endswith(" counts") for line in told.splitlines()) == 2

    store = LocalStore(tmp_path / "store")  # whoever else may write there
    forged = record.model_copy(update={"who": "mallory@elsewhere", "signature": None}).signed(Signer.generate())
    store.put(keys.decision(NAME, pack, forged.digest), forged.to_bytes())
    assert "not in the trust file" in run("decisions", NAME)[1]
