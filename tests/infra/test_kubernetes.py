"""The manifests, put together as kustomize does it, by Kubernetes' schemas and by what must hold of every pod.

No wheel carries kustomize: `build` knows the fields that our files use, and refuses any other.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonpatch
import jsonschema
import kubernetes_validate
import pytest
import yaml

from modelpress.settings import Settings
from serving.main import ServingSettings
from tests.conftest import ROOT
from tests.infra.kubernetes_schemas import NEWEST, OLDEST, check

FOLDER = ROOT / "infra" / "kubernetes"
OVERLAYS = ("local", "production")
CLUSTER_WIDE = {"Namespace"}
KNOWN = {"apiVersion", "kind", "namespace", "labels", "resources", "patches", "images", "replicas"}
Manifest = dict[str, Any]


def build(folder: Path) -> list[Manifest]:
    """What `kubectl kustomize` would print."""
    told = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(told) <= KNOWN, f"{folder}: this test does not know {set(told) - KNOWN}"
    found: list[Manifest] = []
    for name in told["resources"]:
        path = folder / name
        assert path.exists(), path
        found += (
            build(path.resolve()) if path.is_dir() else [one for one in yaml.safe_load_all(path.read_text()) if one]
        )
    for one in found:
        for label in told.get("labels", []):
            one["metadata"].setdefault("labels", {}).update(label["pairs"])
        if one["kind"] not in CLUSTER_WIDE:
            one["metadata"]["namespace"] = told["namespace"]
    for change in told.get("patches", []):
        targets = [one for one in found if matches(one, change["target"])]
        assert targets, f"{folder}: a patch for nothing: {change['target']}"
        for one in targets:
            patched = jsonpatch.apply_patch(one, yaml.safe_load(change["patch"]))
            one.clear()
            one.update(patched)
    for count in told.get("replicas", []):
        (one,) = [one for one in found if one["kind"] == "Deployment" and one["metadata"]["name"] == count["name"]]
        one["spec"]["replicas"] = count["count"]
    text = json.dumps(found)
    for image in told.get("images", []):
        text, changed = re.subn(
            rf'"image": "{image["name"]}:[^"]+"', f'"image": "{image["newName"]}:{image["newTag"]}"', text
        )
        assert changed, f"{folder}: no image {image['name']}"
    found = json.loads(text)
    return found


def matches(one: Manifest, target: dict[str, str]) -> bool:
    assert set(target) == {"kind", "name"}
    return (one["kind"], one["metadata"]["name"]) == (target["kind"], target["name"])


STACKS = {name: build(FOLDER / "overlays" / name) for name in OVERLAYS}
EVERYTHING = [(overlay, one) for overlay, stack in STACKS.items() for one in stack]


def called(pair: tuple[str, Manifest]) -> str:
    overlay, one = pair
    return f"{overlay}-{one['kind']}-{one['metadata']['name']}"


def pods(stack: list[Manifest]) -> Iterator[tuple[str, Manifest, Manifest]]:
    """Name, labels and spec of every pod that the manifests make."""
    for one in stack:
        if "template" in one.get("spec", {}):
            template = one["spec"]["template"]
            yield one["metadata"]["name"], template["metadata"]["labels"], template["spec"]


PODS = [(overlay, *pod) for overlay, stack in STACKS.items() for pod in pods(stack)]
every_pod = pytest.mark.parametrize(
    ("overlay", "name", "labels", "spec"), PODS, ids=[f"{overlay}-{name}" for overlay, name, _, _ in PODS]
)


def of_kind(stack: list[Manifest], kind: str) -> dict[str, Manifest]:
    return {one["metadata"]["name"]: one for one in stack if one["kind"] == kind}


@pytest.mark.parametrize("pair", EVERYTHING, ids=called)
def test_kubernetes_takes_it(pair: tuple[str, Manifest]) -> None:
    for version in (OLDEST, NEWEST):
        check(pair[1], version)


def test_the_schemas_refuse_what_is_none() -> None:
    broken = copy.deepcopy(of_kind(STACKS["local"], "Deployment")["serving"])
    broken["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        check(broken, NEWEST)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_stands_twice_and_no_secret_at_all(overlay: str) -> None:
    names = [(one["kind"], one["metadata"]["name"]) for one in STACKS[overlay]]
    assert len(names) == len(set(names))
    assert "Secret" not in {kind for kind, _ in names}
    for config in of_kind(STACKS[overlay], "ConfigMap").values():
        for key, value in config["data"].items():
            assert not re.search("PASSWORD|SECRET|TOKEN|AUTH_STRING|ACCESS_KEY", key)
            assert not re.search(r"://[^/\s]*:[^/\s]*@", value), "a login in an address"


@every_pod
def test_pods_have_least_rights(overlay: str, name: str, labels: Manifest, spec: Manifest) -> None:
    assert spec["automountServiceAccountToken"] is name.startswith("worker-"), (
        "only workers ask Kubernetes for anything"
    )
    assert spec["enableServiceLinks"] is False
    security = spec["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] > 0
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert not [volume for volume in spec["volumes"] if "hostPath" in volume]
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
        }


@every_pod
def test_containers_have_limits_probes_and_pinned_images(
    overlay: str, name: str, labels: Manifest, spec: Manifest
) -> None:
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"]["requests"])
        assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"]["limits"])
        assert re.search(r":\d+\.\d+[\w.-]*$", container["image"])
    for container in spec["containers"]:
        assert {"readinessProbe", "livenessProbe"} <= set(container)
        ports = {port["name"] for port in container.get("ports", [])}
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            if "httpGet" in container.get(kind, {}):
                assert container[kind]["httpGet"]["port"] in ports
        if "httpGet" in container["livenessProbe"]:
            assert "startupProbe" in container, "a slow start is no death"


@every_pod
def test_what_a_pod_refers_to_is_there(overlay: str, name: str, labels: Manifest, spec: Manifest) -> None:
    stack = STACKS[overlay]
    configs, documented = of_kind(stack, "ConfigMap"), secrets_documented()
    assert spec["serviceAccountName"] in of_kind(stack, "ServiceAccount")
    used: set[tuple[str, str]] = set()
    for volume in spec["volumes"]:
        if "secret" in volume:
            used |= {(volume["secret"]["secretName"], item["key"]) for item in volume["secret"]["items"]}
        if "configMap" in volume:
            assert {item["key"] for item in volume["configMap"]["items"]} <= set(
                configs[volume["configMap"]["name"]]["data"]
            )
    volumes = {volume["name"] for volume in spec["volumes"]}
    claims = [
        claim
        for one in stack
        if one["metadata"]["name"] == name
        for claim in one["spec"].get("volumeClaimTemplates", [])
    ]
    volumes |= {claim["metadata"]["name"] for claim in claims}
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        values: dict[str, str] = {}
        for source in container.get("envFrom", []):
            values |= configs[source["configMapRef"]["name"]]["data"]
        for entry in container.get("env", []):
            if "valueFrom" in entry:
                reference = entry["valueFrom"]["secretKeyRef"]
                used.add((reference["name"], reference["key"]))
            else:
                assert not re.search("PASSWORD$|SECRET$|TOKEN$|AUTH_STRING$", entry["name"])
                values[entry["name"]] = entry["value"]
        for argument in container.get("args", []):
            assert set(re.findall(r"\$\((\w+)\)", argument)) <= set(values)
        known = {f"MODELPRESS_{field.upper()}" for field in Settings.model_fields}
        known |= {f"MODELPRESS_SERVING_{field.upper()}" for field in ServingSettings.model_fields}
        assert {key for key in values if key.startswith("MODELPRESS_")} <= known
    assert used <= documented, "a secret that docs/operations.md does not tell one to make"


def secrets_documented() -> set[tuple[str, str]]:
    """Name and key of the secrets that an installer is told to make."""
    text = (ROOT / "docs" / "operations.md").read_text()
    table = text.split("\n| secret | keys | for |\n")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| ([^|]+) \|", table, re.MULTILINE)
    assert len(rows) > 3
    return {(name, key) for name, keys in rows for key in re.findall("`([a-z.-]+)`", keys)}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_server_speaks_tls_with_what_it_is_given(overlay: str) -> None:
    stack = STACKS[overlay]
    (spec,) = [spec for name, _, spec in pods(stack) if name == "serving"]
    (container,) = spec["containers"]
    (volume,) = [one for one in spec["volumes"] if one["name"] == "tls"]
    (mount,) = [one for one in container["volumeMounts"] if one["name"] == "tls"]
    files = {f"{mount['mountPath']}/{item['path']}": item["key"] for item in volume["secret"]["items"]}
    values = {entry["name"]: entry["value"] for entry in container["env"]}
    assert files[values["MODELPRESS_SERVING_TLS_CERT_FILE"]] == "tls.crt"
    assert files[values["MODELPRESS_SERVING_TLS_KEY_FILE"]] == "tls.key"
    assert not volume["secret"]["defaultMode"] & 0o007, "the server refuses a key that everybody can read"
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[kind]["httpGet"]["scheme"] == "HTTPS"
    for certificate in of_kind(stack, "Certificate").values():
        assert certificate["spec"]["secretName"] == volume["secret"]["secretName"]
        assert {"serving", "serving.modelpress.svc"} <= set(certificate["spec"]["dnsNames"])
    assert bool(of_kind(stack, "Certificate")) == (overlay == "production")


def test_a_certificate_with_a_field_that_is_none_is_refused() -> None:
    broken = copy.deepcopy(of_kind(STACKS["production"], "Certificate")["serving"])
    check(broken, NEWEST)
    broken["spec"]["dnsName"] = broken["spec"].pop("dnsNames")
    with pytest.raises(jsonschema.ValidationError):
        check(broken, NEWEST)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_services_lead_to_pods_and_budgets_guard_them(overlay: str) -> None:
    stack = STACKS[overlay]
    found = list(pods(stack))
    for service in of_kind(stack, "Service").values():
        chosen = [spec for _, labels, spec in found if service["spec"]["selector"].items() <= labels.items()]
        assert len(chosen) == 1, service["metadata"]["name"]
        ports = {port["containerPort"] for port in chosen[0]["containers"][0]["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    guarded = [budget["spec"]["selector"]["matchLabels"] for budget in of_kind(stack, "PodDisruptionBudget").values()]
    for name in ("prefect", "mlflow", "serving", "worker-cpu", "worker-gpu"):
        (labels,) = [labels for other, labels, _ in found if other == name]
        assert [one for one in guarded if one.items() <= labels.items()], name
    for one in stack:
        if "template" in one.get("spec", {}):
            assert (
                one["spec"]["selector"]["matchLabels"].items() <= one["spec"]["template"]["metadata"]["labels"].items()
            )


def allowed(stack: list[Manifest], labels: Manifest, direction: str) -> set[int]:
    """Ports that a pod may be reached at, or may reach, by all policies that choose it."""
    ports: set[int] = set()
    for policy in of_kind(stack, "NetworkPolicy").values():
        if direction in policy["spec"]["policyTypes"] and selects(policy["spec"]["podSelector"], labels):
            for rule in policy["spec"].get(direction.lower(), []):
                ports |= {port["port"] for port in rule["ports"]}
    return ports


def selects(selector: Manifest, labels: Manifest) -> bool:
    assert set(selector) <= {"matchLabels", "matchExpressions"}
    for rule in selector.get("matchExpressions", []):
        assert rule["operator"] == "In"
        if labels.get(rule["key"]) not in rule["values"]:
            return False
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_network_is_closed_but_for_what_each_needs(overlay: str) -> None:
    stack = STACKS[overlay]
    closed = of_kind(stack, "NetworkPolicy")["deny-all"]["spec"]
    assert closed == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    roles = {labels["modelpress/role"]: labels for _, labels, _ in pods(stack)}
    template = json.loads((ROOT / "infra/pools/kubernetes-gpu.json").read_text())["job_configuration"]["job_manifest"]
    roles["run"] = template["spec"]["template"]["metadata"]["labels"]
    out = {role: allowed(stack, labels, "Egress") - {53} for role, labels in roles.items()}
    assert out == {
        "prefect": {5432, 6379},
        "prefect-services": {5432, 6379},
        "mlflow": {5432, 6379, 443},
        "worker": {4200, 5000, 443, 6443},
        "run": {4200, 5000, 443},
        "serving": {443},
        **({"database": set()} if overlay == "local" else {}),
    }
    inside = {role: allowed(stack, labels, "Ingress") for role, labels in roles.items()}
    assert inside["worker"] == inside["run"] == inside["prefect-services"] == set()
    assert inside["serving"] == (set() if overlay == "local" else {4200, 5000, 8080, 8081})


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_workers_may_make_jobs_and_read_no_secret(overlay: str) -> None:
    (role,) = of_kind(STACKS[overlay], "Role").values()
    rights = {
        (group, resource): set(rule["verbs"])
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert "create" in rights["batch", "jobs"]
    assert not [resource for _, resource in rights if resource in ("secrets", "configmaps", "*", "pods/exec")]
    assert not [verbs for verbs in rights.values() if "*" in verbs]
    assert not {"ClusterRole", "ClusterRoleBinding"} & {one["kind"] for one in STACKS[overlay]}
    (binding,) = of_kind(STACKS[overlay], "RoleBinding").values()
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "modelpress-worker", "namespace": "modelpress"}]
    assert all(
        account["automountServiceAccountToken"] is False
        for account in of_kind(STACKS[overlay], "ServiceAccount").values()
    )


def test_the_pools_jobs_find_what_they_refer_to() -> None:
    """The templates of infra/pools/ and these manifests are installed apart, and must agree."""
    for name in ("kubernetes", "kubernetes-gpu"):
        document = json.loads((ROOT / "infra/pools" / f"{name}.json").read_text())
        defaults = {key: spec.get("default") for key, spec in document["variables"]["properties"].items()}
        spec = document["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
        assert defaults["namespace"] == "modelpress"
        (container,) = spec["containers"]
        for stack in STACKS.values():
            assert defaults["service_account_name"] in of_kind(stack, "ServiceAccount")
            assert container["envFrom"][0]["configMapRef"]["name"] in of_kind(stack, "ConfigMap")
        used = {
            (ref["name"], ref["key"])
            for ref in (e["valueFrom"]["secretKeyRef"] for e in container["env"] if "valueFrom" in e)
        }
        used |= {
            (v["secret"]["secretName"], i["key"])
            for v in spec["volumes"]
            if "secret" in v
            for i in v["secret"]["items"]
        }
        assert used <= secrets_documented()
