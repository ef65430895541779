"""KServe's storage initializer: what its init container does before the server of a model starts.

KServe calls the image with pairs of arguments, a source and a folder to fill, and starts the server when it ends with
code 0 (its own is ``initializer-entrypoint``; a ClusterStorageContainer says which image serves which sources, by a
prefix or a regular expression). A source is::

    modelpress://BUCKET/PREFIX/NAME@REF?as=LAYOUT      in s3://BUCKET/PREFIX
    modelpress:///FOLDER/NAME@REF?as=LAYOUT            in a folder, such as a mounted volume

REF is an alias or a digest, and `champion` if it is left out.
"""

from __future__ import annotations

import contextlib
import os
import urllib.parse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modelpress import keys
from modelpress.errors import ConfigError, ModelpressError
from modelpress.load.layouts import LAYOUTS, Layout, pull_into
from modelpress.progress import Progress, silent
from modelpress.settings import Settings, read_settings
from modelpress.store import open_store

SCHEME = "modelpress"
DEFAULT_REF = "champion"
TERMINATION_LOG = Path("/dev/termination-log")
MAX_MESSAGE_BYTES = 4096
"""What Kubernetes keeps of a termination message."""


@dataclass(frozen=True)
class Source:
    """One source, taken apart."""

    store: str
    """URI or folder, as `open_store` takes it."""
    name: str
    ref: str
    layout: Layout


def parse_source(uri: str) -> Source:
    """Take a source URI apart.

    Raises:
        ConfigError: it is none, or names no layout. A login in it is not shown.
    """
    parts = urllib.parse.urlsplit(uri)
    if "@" in parts.netloc:
        raise _illegal("a login before the bucket")
    path, _, last = parts.path.rpartition("/")
    name, _, ref = last.partition("@")
    asked = urllib.parse.parse_qsl(parts.query, keep_blank_values=True)
    if parts.scheme != SCHEME or parts.fragment or not (parts.netloc or path):
        raise _illegal(repr(uri))
    if [key for key, _ in asked] != ["as"] or asked[0][1] not in LAYOUTS:
        raise _illegal(f"?{parts.query}" if parts.query else f"no layout in {uri!r}")
    keys.manifests(name)
    store = f"s3://{parts.netloc}{path}" if parts.netloc else path
    return Source(store, name, ref or DEFAULT_REF, asked[0][1])


def container_settings() -> Settings:
    """The settings; endpoint and region, where they are not set, from what KServe makes of the secret's annotations.

    Raises:
        ConfigError: see `read_settings`.
    """
    settings = read_settings()
    given = {"s3_endpoint_url": os.environ.get("AWS_ENDPOINT_URL"), "s3_region": os.environ.get("AWS_DEFAULT_REGION")}
    return settings.model_copy(
        update={name: value for name, value in given.items() if value and name not in settings.model_fields_set}
    )


def initialise(pairs: Sequence[str], settings: Settings, progress: Progress = silent) -> list[str]:
    """Fill each folder with its source; every digest is checked.

    An alias is resolved once: what is written is one pack, even where the alias moves meanwhile.

    Args:
        pairs: source, folder, source, folder, and so on, as KServe gives them. All are looked at before one is fetched.
        settings: of the store.
        progress: called with bytes read of one pack.

    Returns:
        A line for each: which pack is where.

    Raises:
        ConfigError: no pairs, a source that is none, one folder for two, or a folder that holds what is not ours.
        and see `load.layouts.pull_into`.
    """
    if not pairs or len(pairs) % 2:
        raise ConfigError(
            "reading the arguments", found=f"{len(pairs)} of them", expected="pairs: a source, and a folder to fill"
        )
    work = [(parse_source(uri), Path(folder)) for uri, folder in zip(pairs[::2], pairs[1::2], strict=True)]
    twice = [folder for folder, times in Counter(os.path.realpath(folder) for _, folder in work).items() if times > 1]
    if twice:
        raise ConfigError("reading the arguments", found=f"{twice[0]} twice", expected="a folder of its own for each")
    lines = []
    for source, folder in work:
        store = open_store(source.store, settings)
        digest = pull_into(store, source.name, source.ref, folder, source.layout, progress)
        lines.append(f"{source.name}@{source.ref} is {digest}, as {source.layout} in {folder}")
    return lines


def one_line(error: ModelpressError) -> str:
    """An error as Kubernetes shows it: one line, and not too long."""
    line = "; ".join(" ".join(part.split()) for part in str(error).splitlines())
    return line.encode()[:MAX_MESSAGE_BYTES].decode(errors="ignore")


def leave_message(line: str, path: Path = TERMINATION_LOG) -> None:
    """Write where Kubernetes reads why a container ended; outside of Kubernetes there is no such file."""
    with contextlib.suppress(OSError):
        if path.exists():
            path.write_text(line)


def _illegal(found: str) -> ConfigError:
    return ConfigError(
        "reading a source for KServe",
        found=found,
        expected=f"{SCHEME}://BUCKET/PREFIX/NAME@REF?as=LAYOUT, a layout of {', '.join(LAYOUTS)}",
    )
