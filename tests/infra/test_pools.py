"""The work pools' templates: what Prefect and its workers make of them, down to the job that would be submitted."""

from __future__ import annotations

import asyncio
import json
import pkgutil
from typing import Any

import jsonschema
import pytest
import yaml
from prefect.server.schemas.actions import WorkPoolCreate
from prefect.utilities.templating import find_placeholders
from prefect.workers.base import BaseJobConfiguration

from tests.conftest import ROOT
from tests.infra.kubernetes_schemas import NEWEST, OLDEST, check

POOLS = ROOT / "infra" / "pools"
KINDS = {
    "process": "prefect.workers.process:ProcessJobConfiguration",
    "docker": "prefect_docker.worker:DockerWorkerJobConfiguration",
    "docker-gpu": "prefect_docker.worker:DockerWorkerJobConfiguration",
    "kubernetes": "prefect_kubernetes.worker:KubernetesWorkerJobConfiguration",
    "kubernetes-gpu": "prefect_kubernetes.worker:KubernetesWorkerJobConfiguration",
}
"""By name: these take more than a second to import, which is not for every process that collects tests."""
KUBERNETES = [name for name in KINDS if name.startswith("kubernetes")]
DOCKER = [name for name in KINDS if name.startswith("docker")]
DEPLOYMENTS = yaml.safe_load((ROOT / "infra" / "prefect.yaml").read_text())["deployments"]


def kind(name: str) -> type[BaseJobConfiguration]:
    found: type[BaseJobConfiguration] = pkgutil.resolve_name(KINDS[name])
    return found


def template(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((POOLS / f"{name}.json").read_text())
    return found


def configured(name: str, **values: Any) -> Any:
    """The worker's own configuration of a job, as it is before the run's particulars are put in."""
    given = {"command": "prefect flow-run execute", "name": "optimize-digits", **values}
    nobody: Any = object()  # asked for blocks and variables, of which no template has one
    made = asyncio.run(kind(name).from_template_and_values(template(name), given, client=nobody))
    made.env = {"PREFECT_API_URL": "http://prefect:4200/api", **made.env}
    return made


def job(name: str, **values: Any) -> dict[str, Any]:
    """The manifest that the Kubernetes worker would submit."""
    made = configured(name, **values)
    made._populate_env_in_manifest()
    made._populate_command_if_not_present()
    made._populate_generate_name_if_not_present()
    manifest: dict[str, Any] = made.job_manifest
    return manifest


def test_every_template_is_tested() -> None:
    assert {path.stem for path in POOLS.glob("*.json")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_the_server_takes_it_and_every_variable_is_declared_and_used(name: str) -> None:
    found = template(name)
    WorkPoolCreate(name=name, type=name.partition("-")[0], base_job_template=found)
    used = {place.name for place in find_placeholders(json.dumps(found["job_configuration"]))}
    assert used == set(found["variables"]["properties"])
    assert set(found["job_configuration"]) <= set(kind(name).model_fields)


@pytest.mark.parametrize("name", KINDS)
def test_the_form_has_help_and_its_defaults_are_legal(name: str) -> None:
    variables = template(name)["variables"]
    jsonschema.Draft202012Validator.check_schema(variables)
    for field, spec in variables["properties"].items():
        assert spec["title"], field
        assert spec["description"].endswith("."), field
        if "default" in spec:
            jsonschema.validate(spec["default"], spec)


@pytest.mark.parametrize("name", KINDS)
def test_no_secret_stands_in_it(name: str) -> None:
    assert not [key for key in template(name)["variables"]["properties"]["env"]["default"] if is_secret(key)]


def is_secret(variable: str) -> bool:
    return any(word in variable for word in ("PASSWORD", "SECRET", "TOKEN", "AUTH", "ACCESS_KEY")) or (
        variable.endswith("_KEY")
    )


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("name", KUBERNETES)
def test_the_job_is_one_that_kubernetes_takes(name: str, version: str) -> None:
    manifest = job(name)
    spec = manifest["spec"]["template"]["spec"]
    # The worker refuses a template without these two, which belong one level up; Kubernetes drops them.
    assert (spec.pop("parallelism"), spec.pop("completions")) == (1, 1)
    check(manifest, version)


@pytest.mark.parametrize("name", KUBERNETES)
def test_the_job_has_least_rights_limits_and_secrets_by_reference(name: str) -> None:
    spec = job(name)["spec"]["template"]["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
    }
    for part in ("requests", "limits"):
        assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"][part])
    env = {entry["name"]: entry for entry in container["env"]}
    assert env["PREFECT_API_URL"]["value"] == "http://prefect:4200/api"
    assert env["MODELPRESS_CHECKOUT"]["value"] == "/app"
    assert {name for name in env if is_secret(name)} == {"MLFLOW_TRACKING_PASSWORD"}
    assert set(env["MLFLOW_TRACKING_PASSWORD"]) == {"name", "valueFrom"}
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["volumes"]}


def test_a_gpu_job_asks_for_whole_devices_and_another_for_none() -> None:
    def devices(name: str, **values: Any) -> list[Any]:
        resources = job(name, **values)["spec"]["template"]["spec"]["containers"][0]["resources"]
        return [resources[part].get("nvidia.com/gpu") for part in ("requests", "limits")]

    assert devices("kubernetes") == [None, None]
    assert devices("kubernetes-gpu") == [1, 1]
    assert devices("kubernetes-gpu", gpus=2) == [2, 2]
    assert job("kubernetes-gpu", gpus=2)["spec"]["template"]["spec"]["nodeSelector"]


@pytest.mark.parametrize("name", DOCKER)
def test_dockers_own_client_takes_the_container(name: str) -> None:
    made = configured(name)
    settings = {
        "image": made.image,
        "command": made.command,
        "environment": made.env,
        "network": made.networks[0],
        "volumes": made.volumes,
        "mem_limit": made.mem_limit,
        "memswap_limit": made.memswap_limit,
        "privileged": made.privileged,
        "auto_remove": made.auto_remove,
        "version": "1.45",
        **made.container_create_kwargs,
    }
    created = pkgutil.resolve_name("docker.models.containers:_create_container_args")(settings)
    assert created["user"] == "10001:10001"
    host = created["host_config"]
    assert host["ReadonlyRootfs"] is True
    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert not host.get("Privileged")
    assert host["Memory"] == host["MemorySwap"] == 16 * 2**30
    assert host["NanoCpus"] == 4_000_000_000
    assert [bind for bind in host["Binds"] if bind.endswith("/s3_writer:ro")]
    devices = [request["DeviceIDs"] for request in host.get("DeviceRequests", [])]
    assert devices == ([["0"]] if name == "docker-gpu" else [])


def test_what_deployments_add_is_declared() -> None:
    for deployment in DEPLOYMENTS:
        values = deployment["work_pool"].get("job_variables", {})
        for name in KINDS:
            assert set(values) <= set(template(name)["variables"]["properties"]), deployment["name"]
