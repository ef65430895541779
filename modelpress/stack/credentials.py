"""The credentials of a stack: random, made once, each in a file that its user alone reads."""

from __future__ import annotations

import secrets
import shlex
from dataclasses import dataclass
from pathlib import Path

from modelpress.errors import ConfigError, SetupError
from modelpress.stack.layout import Chosen, Folder, write

USER = "modelpress"
MLFLOW_ADMIN = "admin"
BUCKETS = ("modelpress", "modelpress-work", "mlflow")
STORE, WORK, ARTIFACTS = "s3://modelpress/store", "s3://modelpress-work/work", "s3://mlflow/artifacts"
REGION = "us-east-1"


@dataclass(frozen=True, repr=False)
class Credentials:
    """What opens the stack's doors; not shown by `repr`."""

    prefect: str
    """`user:password` of Prefect's API and UI."""
    mlflow_admin: str
    """Password of MLflow's administrator, `admin`."""
    mlflow: str
    """Password of MLflow's user `modelpress`, whom runs log in as."""
    mlflow_session: str
    """Signs MLflow's sessions."""
    serving: str
    """Bearer token of the serving process."""
    s3_writer: Path
    """AWS credentials file of who publishes."""
    s3_reader: Path
    """AWS credentials file of who serves."""


def make_credentials(folder: Folder) -> Credentials:
    """Read the credentials, and make those that are missing.

    Raises:
        SetupError: they can't be written, or others can read them.
        ConfigError: one is empty.
    """
    for role in ("s3-writer", "s3-reader"):
        key, secret = secrets.token_hex(10).upper(), secrets.token_hex(20)
        _kept(folder, role, f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
    return Credentials(
        prefect=_kept(folder, "prefect", f"{USER}:{secrets.token_hex(24)}"),
        mlflow_admin=_kept(folder, "mlflow-admin", secrets.token_hex(24)),
        mlflow=_kept(folder, "mlflow", secrets.token_hex(24)),
        mlflow_session=_kept(folder, "mlflow-session", secrets.token_hex(24)),
        serving=_kept(folder, "serving", secrets.token_hex(24)),
        s3_writer=folder.keys / "s3-writer",
        s3_reader=folder.keys / "s3-reader",
    )


def _kept(folder: Folder, name: str, new: str) -> str:
    path = folder.keys / name
    doing = f"reading the stack's credential {path}"
    try:
        if not path.exists():
            write(path, new)
        if path.stat().st_mode & 0o077:
            raise SetupError(doing, found="others can read it", expected="mode 0600", fix=f"chmod 600 {path}")
        text = path.read_text().strip()
    except OSError as error:
        raise SetupError(
            doing, found=str(error), fix="see that this user may write there, and that the disk has space"
        ) from error
    if not text:
        raise ConfigError(
            doing, found="an empty file", fix="`modelpress down`, remove it, `modelpress up` makes another"
        )
    return text


def address(chosen: Chosen, part: str) -> str:
    """The URL of a part."""
    return f"http://{chosen.host}:{chosen.ports[part]}"


def client_environment(folder: Folder, chosen: Chosen, keys: Credentials) -> dict[str, str]:
    """What a program needs to use the stack: the worker, and a user's shell."""
    home = folder.path / "home"
    variables = {
        "MODELPRESS_HOME": str(home),
        "MODELPRESS_CHECKOUT": chosen.checkout,
        "MODELPRESS_STORE": chosen.store or STORE,
        "MODELPRESS_WORK": str(home / "work") if chosen.store else WORK,
        "MODELPRESS_TRACKING_URI": address(chosen, "mlflow"),
        "MLFLOW_TRACKING_URI": address(chosen, "mlflow"),
        "MLFLOW_TRACKING_USERNAME": USER,
        "MLFLOW_TRACKING_PASSWORD": keys.mlflow,
        "PREFECT_API_URL": f"{address(chosen, 'prefect')}/api",
        "PREFECT_API_AUTH_STRING": keys.prefect,
    }
    return variables | ({} if chosen.store else s3_environment(chosen, keys.s3_writer))


def s3_environment(chosen: Chosen, credentials: Path) -> dict[str, str]:
    """What reaches the stack's own S3 server."""
    return {
        "MODELPRESS_S3_ENDPOINT_URL": address(chosen, "s3"),
        "MODELPRESS_S3_REGION": REGION,
        "AWS_SHARED_CREDENTIALS_FILE": str(credentials),
    }


def write_shell(folder: Folder, chosen: Chosen, keys: Credentials) -> Path:
    """Write what a shell sources to use the stack, and name the file.

    Raises:
        SetupError: it can't be written.
    """
    variables = client_environment(folder, chosen, keys)
    variables |= {"MODELPRESS_STACK": str(folder.path)}
    if "serving" in chosen.ports:
        variables |= {"MODELPRESS_URL": address(chosen, "serving"), "MODELPRESS_TOKEN": keys.serving}
    lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    if not chosen.store:  # they would go before the file of credentials
        lines.insert(0, "unset AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_PROFILE")
    path = folder.keys / "environment"
    try:
        write(path, "\n".join(lines) + "\n")
    except OSError as error:
        raise SetupError(f"writing {path}", found=str(error)) from error
    return path
