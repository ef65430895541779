"""The manifest for ranks on several machines: by Kubernetes' schemas, by torchrun's own parser, and in itself."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import kubernetes_validate
import pytest
import yaml
from torch.distributed.run import parse_args, parse_min_max_nnodes

from modelpress.config import ParallelConfig
from tests.conftest import ROOT
from tests.infra.kubernetes_schemas import NEWEST, OLDEST, check

FOLDER = ROOT / "infra" / "kubernetes"
MADE: dict[str, dict[str, Any]] = {
    one["kind"]: one for one in yaml.safe_load_all((FOLDER / "training.yaml").read_text())
}
JOB = MADE["Job"]["spec"]
POD = JOB["template"]["spec"]
LABELS = JOB["template"]["metadata"]["labels"]
(RANKS,) = POD["containers"]


@pytest.mark.parametrize("kind", MADE)
def test_kubernetes_takes_it(kind: str) -> None:
    for version in (OLDEST, NEWEST):
        check(MADE[kind], version)
    broken = copy.deepcopy(MADE[kind])
    broken["spec"]["completion_mode"] = "Indexed"
    with pytest.raises(kubernetes_validate.ValidationError):
        check(broken, NEWEST)


def test_torchrun_takes_its_arguments_and_starts_a_rank() -> None:
    assert RANKS["args"][:3] == ["python", "-m", "torch.distributed.run"]
    told = parse_args(RANKS["args"][3:])
    assert parse_min_max_nnodes(told.nnodes) == (1, JOB["parallelism"])
    assert int(told.nproc_per_node) == RANKS["resources"]["limits"]["nvidia.com/gpu"]
    assert told.module
    assert importlib.util.find_spec(told.training_script) is not None
    assert told.training_script_args == ["$(JOB)"]
    assert {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"} in RANKS["env"]
    assert told.max_restarts == ParallelConfig().restarts


def test_the_machines_find_each_other_and_nobody_else_finds_them() -> None:
    assert JOB["completionMode"] == "Indexed"
    assert JOB["completions"] == JOB["parallelism"]
    service = MADE["Service"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= LABELS.items()
    assert POD["subdomain"] == service["metadata"]["name"]
    host, port = parse_args(RANKS["args"][3:]).rdzv_endpoint.split(":")
    assert host == f"{MADE['Job']['metadata']['name']}-0.{POD['subdomain']}"
    assert [one["port"] for one in service["spec"]["ports"]] == [int(port)] == [RANKS["ports"][0]["containerPort"]]
    policy = MADE["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= LABELS.items()
    assert policy["ingress"][0]["from"] == [{"podSelector": policy["podSelector"]}]
    assert {one["metadata"]["namespace"] for one in MADE.values()} == {"modelpress"}


def test_its_pods_have_no_more_rights_than_a_run() -> None:
    run = yaml.safe_load((ROOT / "infra/pools/kubernetes-gpu.json").read_text())["job_configuration"]["job_manifest"]
    theirs = run["spec"]["template"]["spec"]
    for name in ("automountServiceAccountToken", "enableServiceLinks", "securityContext", "tolerations"):
        assert POD[name] == theirs[name], name
    assert RANKS["securityContext"] == theirs["containers"][0]["securityContext"]
    mounts = {mount["name"] for mount in RANKS["volumeMounts"]}
    assert mounts == {volume["name"] for volume in POD["volumes"]}
    assert {volume["name"] for volume in theirs["volumes"]} == mounts
    names = [one["metadata"]["name"] for one in yaml.safe_load_all((FOLDER / "base/service-accounts.yaml").read_text())]
    assert POD["serviceAccountName"] in names
    base = (FOLDER / "base" / "workers.yaml").read_text()
    assert f"image: {RANKS['image']}" in base, "another version than the workers'"
