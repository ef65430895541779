"""The receiver's settings, from the environment; the secret is never printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from modelpress import settings
from modelpress.errors import ConfigError

MIN_SECRET = 16
"""Characters: HMAC is as good as its secret is long."""


class HooksSettings(BaseSettings):
    """Read from ``MODELPRESS_HOOKS_*`` variables."""

    model_config = SettingsConfigDict(
        env_prefix="MODELPRESS_HOOKS_", frozen=True, extra="ignore", use_attribute_docstrings=True
    )

    secret_file: Path | None = None
    """File with the secret that MLflow signs with, one a line: the first is told to MLflow, all are taken."""
    secret: SecretStr = SecretStr("")
    """The same, in the environment, for one secret."""
    host: str = "127.0.0.1"
    """Address to listen on. What MLflow did not sign is refused; TLS is a proxy's to add."""
    port: int = Field(default=8090, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    run: Literal["here", "worker"] = "here"
    """Who looks: this process, within seconds, or a worker, by a run of the deployment."""
    deployment: str = "reconcile/reconcile"
    """What `worker` runs."""
    poll_seconds: float = Field(default=60.0, ge=0)
    """How often `here` looks at everything without an event; 0 only when it starts."""
    tolerance_seconds: float = Field(default=300.0, gt=0, le=3600)
    """How old or new a signature may be: clocks differ, and MLflow repeats what was not answered."""
    max_body_bytes: int = Field(default=65_536, ge=1)
    """A larger request is refused."""
    max_connections: int = Field(default=64, ge=1)
    """Connections at a time; more get 503, and MLflow tries again."""
    folder: Path | None = None
    """Where deliveries are remembered. Default: `<home>/hooks`."""

    def secrets(self) -> list[bytes]:
        """The secrets, in their order.

        Raises:
            ConfigError: there is none, one is short, or the file can't be read.
        """
        doing, lines = "reading MODELPRESS_HOOKS_SECRET", [self.secret.get_secret_value()]
        if self.secret_file is not None:
            doing = f"reading {self.secret_file}, named by MODELPRESS_HOOKS_SECRET_FILE"
            try:
                lines = self.secret_file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                found = error.strerror if isinstance(error, OSError) else "bytes that are no UTF-8"
                raise ConfigError(doing, found=found, expected="a file that this process may read") from error
        secrets = [line.strip().encode() for line in lines if line.strip()]
        if not secrets or any(len(secret) < MIN_SECRET for secret in secrets):
            raise ConfigError(
                doing,
                found=f"a secret of {min(map(len, secrets))} characters" if secrets else "no secret",
                expected=f"one of {MIN_SECRET} characters or more",
                fix="make one: python -c 'import secrets; print(secrets.token_urlsafe(32))' > FILE",
            )
        return secrets


def read_settings(**given: Any) -> HooksSettings:
    """Settings from the environment, with what was `given` (not None) on top.

    Raises:
        ConfigError: a value is not legal; the variable is named.
    """
    return settings.read_as(HooksSettings, "reading the settings of the receiver", **given)
