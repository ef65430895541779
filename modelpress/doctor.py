"""What this machine, the store and the servers must be, checked by doing it, with the way to mend each.

Prefect and MLflow are looked at from outside, over HTTP: the library imports neither.
"""

from __future__ import annotations

import ipaddress
import os
import platform
import shutil
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Literal

from modelpress.errors import AccessDeniedError, ModelpressError
from modelpress.providers import CPU, CUDA, MIGRAPHX, Provider
from modelpress.settings import Settings, is_shared_database, without_logins

GIB = 2**30
LEAST_DISK_BYTES, GOOD_DISK_BYTES = 1 * GIB, 10 * GIB
LEAST_MEMORY_BYTES, GOOD_MEMORY_BYTES = 1 * GIB, 4 * GIB
HTTP_SECONDS = 5.0
SOON_DAYS = 30

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: what was checked, how it stands, and how to mend it."""

    check: str
    status: Status
    found: str
    fix: str = ""


def examine(settings: Settings, providers: Sequence[str] = ()) -> Iterator[Finding]:
    """Check everything, one finding at a time; nothing is raised, a check that breaks is a finding.

    Args:
        settings: the endpoints and folders to look at.
        providers: ONNX Runtime execution providers that must be usable. Empty: the CPU's, and the one
            of the GPU that torch sees, if any.
    """
    yield _python()
    yield _packages()
    found, of_gpu = _torch()
    yield found
    for provider in providers or [CPU, *of_gpu]:
        yield _guarded(f"ONNX Runtime {provider}", lambda provider=provider: _provider(provider))  # type: ignore[misc]
    yield from _stores(settings)
    yield _transport(settings)
    yield _guarded("keys", lambda: _keys(settings))
    yield _guarded("signatures", lambda: _signatures(settings))
    yield _mlflow(settings)
    yield _prefect(os.environ.get("PREFECT_API_URL", ""))
    yield _disk(settings.home)
    yield _memory()


def check_provider(provider: str) -> str:
    """Run a small graph on an execution provider.

    Returns:
        The version of ONNX Runtime.

    Raises:
        SetupError: it is not in this build, does not start on this machine, or leaves the graph to the CPU.
    """
    import numpy as np
    import onnxruntime

    from modelpress import graph
    from modelpress.probes import probe

    session = graph.session(graph.split(probe(provider)), provider, threads=1)
    (taken,) = session.get_inputs()
    session.run(None, {taken.name: np.ones(taken.shape, np.float32)})
    return str(onnxruntime.__version__)


def _guarded(check: str, work: Callable[[], Finding]) -> Finding:
    try:
        return work()
    except ModelpressError as error:
        fix = error.fix or (f"expected: {error.expected}" if error.expected else str(error))
        return Finding(check, "fail", error.found or error.doing, fix)


def _python() -> Finding:
    return Finding("Python", "ok", platform.python_version())  # pip let no older one install us


def _packages() -> Finding:
    """Every declared dependency is installed in a version that is allowed."""
    from packaging.requirements import Requirement

    wrong, count = [], 0
    for text in metadata.requires("modelpress") or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version}, not {requirement.specifier}")
    if wrong:
        return Finding("packages", "fail", "; ".join(wrong), "make venv, or pip install --upgrade modelpress")
    return Finding("packages", "ok", f"modelpress {metadata.version('modelpress')} and its {count} dependencies")


def _torch() -> tuple[Finding, list[Provider]]:
    try:
        import torch
    except ImportError as error:
        return Finding("torch", "fail", str(error), "pip install torch"), []
    if not torch.cuda.is_available():
        return Finding("torch", "ok", f"{torch.__version__}, no GPU: training runs on the CPU"), []
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    # torch's ROCm build shows AMD's GPUs as CUDA devices.
    return Finding("torch", "ok", f"{torch.__version__}, {names}"), [CUDA if torch.version.hip is None else MIGRAPHX]


def _provider(provider: str) -> Finding:
    version = check_provider(provider)
    return Finding(f"ONNX Runtime {provider}", "ok", f"{version}, ran a graph")


def _transport(settings: Settings) -> Finding:
    """What leaves this machine travels by TLS."""
    addresses = {
        "MODELPRESS_S3_ENDPOINT_URL": settings.s3_endpoint_url,
        "MODELPRESS_KMS_ENDPOINT_URL": settings.kms_endpoint_url,
        "MODELPRESS_TRACKING_URI": settings.tracking_uri,
        "PREFECT_API_URL": os.environ.get("PREFECT_API_URL", ""),
    }
    clear = [name for name, address in addresses.items() if _in_clear(address)]
    if clear:
        fix = "give https:// addresses; AWS_CA_BUNDLE names a file of certificates of your own"
        return Finding(
            "TLS", "warn", f"http:// to another machine in {', '.join(clear)}: anybody on the way reads", fix
        )
    return Finding("TLS", "ok", "nothing leaves this machine by http://")


def _in_clear(address: str) -> bool:
    parts = urllib.parse.urlsplit(address)
    host = parts.hostname or ""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost" or host.endswith(".localhost")
    return parts.scheme == "http" and not local


def _keys(settings: Settings) -> Finding:
    """The keys that open encrypted packs can be read, by this user alone. KMS is not asked."""
    from modelpress.cipher import wrapping_keys

    names = ", ".join(str(key) for key in wrapping_keys(settings))
    paths = filter(None, settings.key_file.split(os.pathsep))
    if shared := [path for path in paths if Path(path).stat().st_mode & 0o077]:
        return Finding("keys", "warn", f"{names}; others can read {', '.join(shared)}", f"chmod 600 {shared[0]}")
    return Finding("keys", "ok", names or "none: packs are not encrypted, and encrypted ones do not open")


def _signatures(settings: Settings) -> Finding:
    """The trust file can be read, each role that it asks for has a key that counts, and our own is one of them."""
    from modelpress.trust import Signer, read_policy
    from modelpress.trust.policy import now

    own = None
    if settings.signing_key_file is not None:
        own = Signer.load(settings.signing_key_file, settings.signing_key_passphrase.get_secret_value())
    signs = f"signs with {own.key_id[:12]}" if own else "signs nothing"
    if settings.trust is None:
        return Finding("signatures", "ok", f"none are asked for (no MODELPRESS_TRUST); {signs}")
    policy, then = read_policy(settings.trust), now()
    late = then + timedelta(days=SOON_DAYS)
    for role in sorted({*policy.required, *policy.pointers}):
        keys = [key for key in policy.keys if key.role == role]
        if not any(key.state(then) is None for key in keys):
            found = f"{settings.trust}: no key of role {role!r} counts: {keys[0].state(then)}"
            return Finding("signatures", "fail", found, "add a key: modelpress trust new-key; then sign again with it")
        if not any(key.state(late) is None for key in keys):
            found = f"{settings.trust}: in {SOON_DAYS} days no key of role {role!r} counts any more"
            return Finding("signatures", "warn", found, "add a key now, and sign with both until then")
    if own is not None:
        entry = policy.find(own.key_id)
        if (why := "it is not in the file" if entry is None else entry.state(then)) is not None:
            found = f"{signs}, which {settings.trust} does not let count: {why}"
            return Finding("signatures", "warn", found, "add the key to that file, or sign with another")
    count = sum(key.state(then) is None for key in policy.keys)
    return Finding("signatures", "ok", f"{settings.trust}: {count} of {len(policy.keys)} keys count; {signs}")


def _stores(settings: Settings) -> Iterator[Finding]:
    for check, uri in (("store", settings.store_uri), ("work store", settings.work_uri)):
        yield _guarded(check, lambda check=check, uri=uri: _store(check, uri, settings))  # type: ignore[misc]


def _store(check: str, uri: str, settings: Settings) -> Finding:
    from modelpress import keys
    from modelpress.store import open_store

    store = open_store(uri, settings)
    next(store.list(keys.PACKS), None)
    try:
        store.check_fit()
    except AccessDeniedError as error:
        return Finding(
            check,
            "warn",
            f"{store.uri}: may be read, not written ({error.found})",
            "enough for serving; publishing needs a key that may write",
        )
    return Finding(check, "ok", f"{store.uri}: read, written, a second conditional write was refused")


def _mlflow(settings: Settings) -> Finding:
    uri = settings.mlflow_uri
    if uri.startswith(("http://", "https://")):
        return _http("MLflow", uri.rstrip("/") + "/health", "start it: mlflow server; or set MODELPRESS_TRACKING_URI")
    if uri.startswith("sqlite:///"):
        folder = _existing(Path(uri.removeprefix("sqlite:///")).parent)
        if not os.access(folder, os.W_OK):
            return Finding("MLflow", "fail", f"{uri}: {folder} can't be written", "set MODELPRESS_HOME elsewhere")
        return Finding("MLflow", "ok", f"{uri} (a local database, for one user)")
    found, fix = without_logins(uri), "see that this machine reaches it"
    if is_shared_database(uri):
        fix = "start mlflow server with it as --backend-store-uri, and name the server's address"
        return Finding("MLflow", "fail", f"{found}: a database, and not a server", fix)
    return Finding("MLflow", "warn", f"{found}: not looked into", fix)


def _prefect(api: str) -> Finding:
    if not api:
        return Finding("Prefect", "ok", "no PREFECT_API_URL: the profile's server, else each run starts its own")
    return _http("Prefect", api.rstrip("/") + "/health", "start it: prefect server start; or unset PREFECT_API_URL")


def _http(check: str, url: str, fix: str) -> Finding:
    import httpx

    try:
        answer = httpx.get(url, timeout=HTTP_SECONDS, follow_redirects=True)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return Finding(check, "fail", without_logins(f"{url}: {error}"), fix)
    url = without_logins(url)
    if answer.status_code in (401, 403):
        return Finding(
            check, "warn", f"{url}: {answer.status_code}, it asks for credentials", "see that runs have them"
        )
    if answer.is_error:
        return Finding(check, "fail", f"{url}: status {answer.status_code}", fix)
    return Finding(check, "ok", f"{url} answers")


def _disk(home: Path) -> Finding:
    folder = _existing(home)
    free = shutil.disk_usage(folder).free
    return _amount(
        "disk", free, LEAST_DISK_BYTES, GOOD_DISK_BYTES, f"free at {folder}", "free space, or set MODELPRESS_HOME"
    )


def _memory() -> Finding:
    import psutil

    free = int(psutil.virtual_memory().available)
    return _amount("memory", free, LEAST_MEMORY_BYTES, GOOD_MEMORY_BYTES, "available", "end other programs")


def _amount(check: str, have: int, least: int, good: int, what: str, fix: str) -> Finding:
    status: Status = "ok" if have >= good else "warn" if have >= least else "fail"
    found = f"{have / GIB:.1f} GiB {what}"
    return Finding(check, status, found, "" if status == "ok" else f"{fix}; {good / GIB:.0f} GiB are comfortable")


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
