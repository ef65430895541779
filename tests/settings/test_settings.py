"""Settings from the environment."""

from __future__ import annotations

import pytest

from modelpress.errors import ConfigError
from modelpress.settings import read_settings, without_logins


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELPRESS_S3_ATTEMPTS", "7")
    assert read_settings().s3_attempts == 7


@pytest.mark.parametrize(
    ("name", "value"),
    [("S3_TIMEOUT_SECONDS", "soon"), ("S3_TIMEOUT_SECONDS", "-1"), ("S3_ATTEMPTS", "0"), ("REUSE", "perhaps")],
)
def test_a_bad_value_names_its_variable(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"MODELPRESS_{name}", value)
    with pytest.raises(ConfigError, match=f"MODELPRESS_{name}='{value}'"):
        read_settings()


def test_addresses_are_shown_without_their_logins() -> None:
    assert without_logins("talking to http://name:p:w@host:1/x and s3://b") == "talking to http://host:1/x and s3://b"
