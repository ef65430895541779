"""The stack on one machine: by Compose's own schema, and by what its first lines promise."""

from __future__ import annotations

import configparser
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from modelpress.settings import Settings
from serving.keyring import Keyring, Sources
from serving.main import ServingSettings
from tests.conftest import ROOT

FILE = ROOT / "infra" / "compose.yaml"
STACK: dict[str, Any] = yaml.safe_load(FILE.read_text())
SERVICES: dict[str, dict[str, Any]] = STACK["services"]
SCHEMA = json.loads((Path(__file__).parent / "schemas" / "compose-spec.json").read_text())
ONE_SHOT = {"prefect-migrate", "setup"}

every_service = pytest.mark.parametrize("name", SERVICES)


def test_it_is_a_compose_file() -> None:
    jsonschema.Draft7Validator(SCHEMA).validate(STACK)


def test_the_schema_refuses_what_is_none() -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(SCHEMA).validate({"services": {"x": {"imagee": "y"}}})


@every_service
def test_least_rights(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices", "userns_mode"} & set(service)
    if "build" not in service:  # ours say USER themselves, see test_images.py
        uid, _, gid = service["user"].partition(":")
        assert int(uid) > 0
        assert int(gid) > 0
    assert not [volume for volume in service.get("volumes", []) if volume.startswith("/") or "docker.sock" in volume]


@every_service
def test_limits(name: str) -> None:
    limits = SERVICES[name]["deploy"]["resources"]["limits"]
    assert set(limits) == {"cpus", "memory", "pids"}
    assert all(re.search(r":.*size=|size=", mount) for mount in SERVICES[name].get("tmpfs", []))


@every_service
def test_health_and_order(name: str) -> None:
    service = SERVICES[name]
    check = service["healthcheck"]
    if name in ONE_SHOT:
        assert check == {"disable": True}
        assert service["restart"] == "no"
    else:
        assert check["test"][0] == "CMD"
        assert {"interval", "timeout", "retries"} <= set(check)
        assert service["restart"] == "unless-stopped"
    for other, how in service.get("depends_on", {}).items():
        expected = "service_completed_successfully" if other in ONE_SHOT else "service_healthy"
        assert how == {"condition": expected}, other
        assert "profiles" not in SERVICES[other], "it would not be started"


@every_service
def test_ports_are_on_loopback(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)
        assert "edge" in SERVICES[name]["networks"], "an internal network publishes nothing"


@every_service
def test_images_are_pinned(name: str) -> None:
    assert re.fullmatch(r"[a-z0-9-]+:\d+\.\d+[\w.-]*", SERVICES[name]["image"])
    build = SERVICES[name].get("build")
    if build:
        assert (ROOT / build["dockerfile"]).is_file()
        assert (FILE.parent / build["context"]).resolve() == ROOT


@every_service
def test_secrets_are_files_and_each_has_only_its_own(name: str) -> None:
    service = SERVICES[name]
    granted = set(service.get("secrets", []))
    assert granted <= set(STACK["secrets"])
    text = json.dumps({key: service.get(key) for key in ("command", "environment", "entrypoint")})
    assert set(re.findall(r"/run/secrets/(\w+)", text)) <= granted, "a secret that is not mounted"
    for variable, value in service.get("environment", {}).items():
        if re.search("PASSWORD|SECRET|TOKEN|AUTH_STRING|ACCESS_KEY|CREDENTIALS", variable):
            assert value.startswith("/run/secrets/"), variable
        assert "@" not in value, "no login in an address"


def test_each_secret_goes_no_further_than_it_must() -> None:
    holders = {
        secret: {name for name, service in SERVICES.items() if secret in service.get("secrets", [])}
        for secret in STACK["secrets"]
    }
    workers = {"setup", "worker", "worker-gpu"}
    assert holders == {
        "prefect_db_password": {"prefect-db", "prefect-migrate", "prefect", "prefect-services"},
        "prefect_auth": {"prefect", *workers},
        "mlflow_db_password": {"mlflow-db", "mlflow"},
        "mlflow_password": {"mlflow", *workers},
        "mlflow_session_key": {"mlflow"},
        "s3_writer": {"s3", "mlflow", *workers},
        "s3_reader": {"s3", "serving"},
        "serving_keys": {"serving"},
    }


def test_databases_are_reached_by_their_servers_alone() -> None:
    members = {
        network: {name for name, service in SERVICES.items() if network in service["networks"]}
        for network in STACK["networks"]
    }
    assert members["prefect-data"] == {"prefect-db", "redis", "prefect-migrate", "prefect", "prefect-services"}
    assert members["mlflow-data"] == {"mlflow-db", "mlflow"}
    assert not members["edge"] & {"worker", "worker-gpu", "setup", "prefect-db", "mlflow-db", "redis"}
    assert all((STACK["networks"][name] or {}).get("internal") for name in members if name != "edge")


def test_every_setting_is_one_that_is_read() -> None:
    known = {f"MODELPRESS_{field.upper()}" for field in Settings.model_fields}
    known |= {f"MODELPRESS_SERVING_{field.upper()}" for field in ServingSettings.model_fields}
    for name, service in SERVICES.items():
        ours = {key for key in service.get("environment", {}) if key.startswith("MODELPRESS_")}
        assert ours <= known, name


def test_prefects_settings_are_ones_that_are_read() -> None:
    """By Prefect's own models: an unknown variable would be ignored in silence."""
    from prefect.settings.legacy import _get_settings_fields
    from prefect.settings.models.root import Settings as PrefectSettings

    known = set(_get_settings_fields(PrefectSettings))
    for service in SERVICES.values():
        used = {key for key in service.get("environment", {}) if key.startswith("PREFECT_")}
        assert {key for key in used if not key.startswith("PREFECT_REDIS_")} <= known


def test_the_secrets_are_made_once_and_not_shown(tmp_path: Path) -> None:
    def make() -> str:
        command = ["/bin/sh", str(ROOT / "infra/secrets.sh"), str(tmp_path / "secrets")]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    said = make()
    made = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert set(made) == {*STACK["secrets"], "serving_key"}, "the clients' own is mounted nowhere"
    assert (
        Keyring(Sources(tmp_path / "secrets" / "serving_keys")).check(f"Bearer {made['serving_key']}", "promote").name
        == "compose"
    )
    assert len(set(made.values())) == len(made)
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    assert all(re.fullmatch("[0-9a-f]{48}", made[name]) for name in made if name.endswith("password"))
    for name in ("s3_writer", "s3_reader"):
        parser = configparser.ConfigParser()
        parser.read_string(made[name])
        assert len(parser["default"]["aws_access_key_id"]) == 20
        assert len(parser["default"]["aws_secret_access_key"]) == 40
    assert not [value for value in made.values() if value in said]
    os.unlink(tmp_path / "secrets" / "prefect_auth")
    again = make()
    assert again.strip().endswith("prefect_auth")
    assert again.count("\n") == 1
    assert made["s3_writer"] == (tmp_path / "secrets" / "s3_writer").read_text()
