"""Where things are: endpoints, folders and credentials, from the environment and never from a flow's parameters.

Credentials for S3 follow the AWS SDK's own chain (``AWS_ACCESS_KEY_ID``, profiles, instance roles); they are never
read, stored or printed here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, Json, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from modelpress.errors import ConfigError
from modelpress.providers import CPU, Provider

SettingsT = TypeVar("SettingsT", bound=BaseSettings)


class Settings(BaseSettings):
    """Read from ``MODELPRESS_*`` variables; see `docs/operations.md`."""

    model_config = SettingsConfigDict(
        env_prefix="MODELPRESS_", frozen=True, extra="ignore", use_attribute_docstrings=True
    )

    home: Path = Path(".modelpress")
    """Folder for everything local: caches, the default stores, the default tracking database."""
    store: str = ""
    """Where packs are published: `s3://bucket/prefix`, or a folder. Default: `<home>/store`."""
    work: str = ""
    """Where stages keep their outputs, on a store that all workers reach. Default: `<home>/work`."""
    s3_endpoint_url: str = ""
    """S3 endpoint; empty takes the AWS SDK's own."""
    s3_region: str = "us-east-1"
    """S3 region."""
    s3_connect_seconds: float = Field(default=5.0, gt=0)
    """How long a connection may take, TLS included."""
    s3_timeout_seconds: float = Field(default=30.0, gt=0)
    """Silence, in either direction, after which a request is given up and sent again."""
    s3_deadline_seconds: float = Field(default=600.0, gt=0)
    """How long a request of at most 64 MiB and its repeats may take in all, however lively the line."""
    s3_attempts: int = Field(default=5, ge=1, le=20)
    """How often a request is sent before the store counts as unavailable."""
    s3_backoff_seconds: float = Field(default=0.5, ge=0)
    """Before attempt n + 1 a random wait below this times 2ⁿ, and below 20 seconds."""
    upload_abandoned_days: float = Field(default=7.0, gt=0, le=365)
    """How long an upload that was cut off keeps what it sent from being collected."""
    cache: str = ""
    """Folder that keeps verified blobs for the next load on this machine; empty: none."""
    cache_bytes: int = Field(default=20 * 2**30, gt=0)
    """What the cache may hold; the blobs that were read longest ago go first."""
    key_file: str = ""
    """Files with a key (base64 of 32 bytes) that models' secrets are wrapped with, parted by `:`; the first wraps,
    all open."""
    key: SecretStr = SecretStr("")
    """The same, the keys themselves, parted by commas."""
    kms_key_id: str = ""
    """The same, keys of AWS KMS: ids, ARNs or aliases, parted by commas."""
    kms_endpoint_url: str = ""
    """KMS endpoint; empty takes the AWS SDK's own."""
    tracking_uri: str = ""
    """MLflow tracking and registry server. Default: SQLite in `<home>/mlflow.db`."""
    trust: Path | None = None
    """The file of trusted keys (see `modelpress.trust`). Unset: signatures are not asked for."""
    signing_key_file: Path | None = None
    """The private key, PEM, that signs what is published and promoted. Unset: nothing is signed."""
    signing_key_passphrase: SecretStr = SecretStr("")
    """Its passphrase, where it has one."""
    nudge_urls: str = ""
    """Addresses of servers, parted by commas, that are told at once when this process moves an alias. Empty: none."""
    nudge_secret_file: Path | None = None
    """File with the secret that nudges are signed with, which the servers have as well."""
    training_seconds: float = Field(default=60.0, ge=0)
    """How often a training keeps its state in the work store, so that it goes on from there when it was killed: after
    so many seconds at the earliest, and so that keeping takes at most a twentieth of its time; 0: after each update."""
    gpu_lease_seconds: float = Field(default=120.0, ge=60, le=86_400)
    """How long a GPU stays taken when the process that held it dies; renewed at three quarters of it."""
    hardware: str = Field(default="", pattern=r"^([a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?)?$")
    """Class of this machine, a name of your own such as `c7i-2xlarge`: what is measured here counts for it in the gate
    (`gate.hardware`). Empty: figures have no class."""
    provider_options: Json[dict[Provider, dict[str, str]]] = Field(default="{}")  # type: ignore[arg-type]  # is parsed, too
    """JSON: for an execution provider of ONNX Runtime, by its name, the options that this machine gives it, such as
    `{"VitisAIExecutionProvider": {"config_file": "/etc/vitisai_config.json", "cache_dir": "/var/cache/vitisai"}}`."""
    mlflow_reports: Literal["auto", "all", "none"] = "auto"
    """Which runs leave their reports in MLflow, which keeps them in the clear: the page, the stages' own reports, plots
    that name layers, attributions of single samples. `auto`: those whose packs are not encrypted; `all`; `none`. The
    recipe, the numbers and the verdicts, which the gate reads there, are in MLflow always."""
    log: Literal["text", "json"] = "text"
    """How flows log to the terminal: Prefect's lines, or a JSON object in each line."""
    metrics: Path | None = None
    """Folder of the node exporter's textfile collector: each run of the line leaves its numbers there. Unset: none."""
    reuse: bool = True
    """Take a stage's finished output when its key matches; off recomputes everything."""

    @field_validator("provider_options")
    @classmethod
    def _check_options(cls, options: dict[Provider, dict[str, str]]) -> dict[Provider, dict[str, str]]:
        if CPU in options:
            raise ValueError(f"{CPU} takes no options")
        return options

    @property
    def store_uri(self) -> str:
        """The publication store, with its default filled in."""
        return self.store or str((self.home / "store").absolute())

    @property
    def work_uri(self) -> str:
        """The stage store, with its default filled in."""
        return self.work or str((self.home / "work").absolute())

    def reports_to_mlflow(self, *, encrypted: bool) -> bool:
        """Whether MLflow gets the reports of a run whose pack is encrypted, or is not."""
        return self.mlflow_reports == "all" or (self.mlflow_reports == "auto" and not encrypted)

    @property
    def seen(self) -> Path:
        """Where is kept how far pointers were seen; see `modelpress.trust.seen`."""
        return self.home / "seen"

    def options_of(self, provider: str) -> dict[str, str]:
        """The options that this machine gives an execution provider; none for one that is not named."""
        return {
            name: given
            for key, options in self.provider_options.items()
            if key == provider
            for name, given in options.items()
        }

    @property
    def mlflow_uri(self) -> str:
        """The MLflow server, with its default filled in."""
        return self.tracking_uri or f"sqlite:///{(self.home / 'mlflow.db').absolute()}"


def read_settings() -> Settings:
    """Settings from the environment.

    Raises:
        ConfigError: a value is not legal; the variable is named.
    """
    return read_as(Settings, "reading the settings")


def read_as(kind: type[SettingsT], doing: str, **given: Any) -> SettingsT:
    """Settings of a class from the environment, with what was `given` (not None) on top.

    Raises:
        ConfigError: a value is not legal; the variable is named.
    """
    try:
        return kind(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        prefix = kind.model_config.get("env_prefix", "")
        told = "; ".join(
            f"{prefix}{str(one['loc'][0]).upper()}={one['input']!r}: {one['msg']}"
            for one in error.errors(include_url=False)
        )
        raise ConfigError(doing, found=told) from error


def without_logins(text: str) -> str:
    """A text without the logins of the addresses in it (``http://name:password@host``)."""
    return re.sub(r"://[^/\s]*@", "://", text)


def is_shared_database(uri: str) -> bool:
    """Whether the address of an MLflow server is that of a database behind one."""
    return uri.partition(":")[0].partition("+")[0] in ("mssql", "mysql", "postgresql")
