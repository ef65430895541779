"""A store that only reads: the objects of a file of links, each of which works for a while and without credentials.

`modelpress.share` writes such a file; `links+file:///path/links.json` is its URI. A link is a secret: it stands in the
file alone, and in no error, log or URI. What comes from it is verified like anything else.
"""
# ruff: noqa: D102  (methods are documented where the interface is, in base.py)

from __future__ import annotations

import contextlib
import hashlib
import itertools
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn
from urllib.parse import unquote, urlsplit

import botocore.session
from botocore.awsrequest import AWSRequest
from botocore.exceptions import BotoCoreError
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_serializer

from modelpress.config import PackName
from modelpress.errors import (
    AccessDeniedError,
    ConfigError,
    CorruptionError,
    NotFoundError,
    StoreError,
    StoreUnavailableError,
    StoreUnfitError,
)
from modelpress.manifest import Sha256, Size
from modelpress.settings import Settings
from modelpress.store.base import ObjectInfo, Store, check_key, check_range
from modelpress.store.local import local_errors, write_secret
from modelpress.store.receive import Target, receive
from modelpress.store.s3_client import TRANSIENT_STATUS, back_off
from modelpress.store.s3_multipart import PART_BYTES, PARTS_IN_FLIGHT
from modelpress.store.threads import ClosedError, DaemonPool
from modelpress.store.wire import Wire, tls_context
from modelpress.strictjson import loads

if TYPE_CHECKING:
    from typing_extensions import Buffer

SCHEME = "links+file://"
MAX_FILE_BYTES = 2**26


class Link(BaseModel):
    """One object, and the address that gives it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)

    url: SecretStr
    """The address, signed."""
    size_bytes: Size
    """Length of the object."""
    modified: AwareDatetime
    """When it was written."""

    @field_serializer("url", when_used="json")
    def _spell(self, url: SecretStr) -> str:
        return url.get_secret_value()


class Links(BaseModel):
    """A file of links: all that loading one pack needs."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)

    format_version: Literal[1] = 1
    """Version of this layout."""
    name: PackName
    """Pack name."""
    pack: Sha256
    """Digest of the manifest."""
    expires: AwareDatetime
    """When the links end; sooner if the credentials that signed them do."""
    objects: dict[str, Link] = Field(min_length=1)
    """By key."""

    def write(self, path: Path) -> None:
        """Write to a new file that only its owner reads.

        Raises:
            ConfigError: the file exists.
            StoreError: it cannot be written; nothing of it stays.
        """
        data = (self.model_dump_json(indent=1) + "\n").encode()
        write_secret(path, data, f"writing links to {path}", "remove it, or name another")


class LinkStore(Store):
    """The objects of a file of links.

    Requests go straight to where the links point, through no proxy, and follow no redirect; silence, deadline and
    repeats are those of S3.

    Raises:
        ConfigError: the file is none of links, or AWS_CA_BUNDLE none of certificates.
        NotFoundError: there is no file.
    """

    def __init__(self, uri: str, settings: Settings) -> None:
        path = Path(unquote(uri.removeprefix(SCHEME)))
        super().__init__(uri)
        self.links = _read(path)
        self._attempts, self._backoff = settings.s3_attempts, settings.s3_backoff_seconds
        bundle = botocore.session.Session().get_config_variable("ca_bundle")
        try:
            context = tls_context(bundle)
        except OSError as error:
            fix = "set AWS_CA_BUNDLE to a file or folder of certificates, or unset it"
            raise ConfigError(f"opening {uri}", found=f"certificates {bundle}: {error}", fix=fix) from error
        self._pool = DaemonPool(PARTS_IN_FLIGHT, "link")
        self._wire = Wire(
            connect=min(settings.s3_connect_seconds, settings.s3_timeout_seconds),
            silence=settings.s3_timeout_seconds,
            deadline=settings.s3_deadline_seconds,
            context=context,
        )

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        check_range(key, start, length)
        return b"".join(self._pieces(key, start, length))

    def read_into(
        self, key: str, buffer: Buffer, start: int = 0, arrived: Callable[[memoryview], None] = lambda _: None
    ) -> None:
        check_range(key, start, None)
        view = memoryview(buffer).cast("B")
        doing, link, _ = self._found(key, start, len(view))
        places = ((start + at, view[at : at + PART_BYTES]) for at in range(0, len(view), PART_BYTES))

        def fetch(offset: int, target: Target) -> None:
            self._range(doing, link, offset, len(target.view), target)

        try:
            receive(self._pool, fetch, places, PARTS_IN_FLIGHT, arrived)
        except (CancelledError, ClosedError) as error:
            raise StoreUnavailableError(doing, found="that the store was closed meanwhile") from error

    def download(self, key: str, path: Path) -> str:
        digest = hashlib.sha256()
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        with local_errors(f"downloading {self.uri}/{key} to {path}"):
            try:
                with partial.open("xb") as target:
                    for piece in self._pieces(key, 0, None):
                        digest.update(piece)
                        target.write(piece)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        return digest.hexdigest()

    def info(self, key: str) -> ObjectInfo | None:
        link = self.links.objects.get(check_key(key))
        return None if link is None else ObjectInfo(key, link.size_bytes, link.modified)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        check_key(prefix, prefix=True)
        for key in sorted(self.links.objects, key=str.encode):
            if key.startswith(prefix):
                yield ObjectInfo(key, self.links.objects[key].size_bytes, self.links.objects[key].modified)

    def put(self, key: str, data: bytes | Path, *, if_absent: bool = False, sha256: str | None = None) -> bool:
        del data, if_absent, sha256
        self._refuse(f"storing {self.uri}/{check_key(key)}")

    def delete(self, key: str) -> None:
        self._refuse(f"deleting {self.uri}/{check_key(key)}")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._wire.close()

    def _refuse(self, doing: str) -> NoReturn:
        raise AccessDeniedError(doing, found="a file of links", expected="a store that can be written")

    def _pieces(self, key: str, start: int, length: int | None) -> Iterator[bytes]:
        doing, link, end = self._found(key, start, length)
        for offset in range(start, end, PART_BYTES):
            yield self._range(doing, link, offset, min(PART_BYTES, end - offset))

    def _found(self, key: str, start: int, length: int | None) -> tuple[str, Link, int]:
        """What is being done, the link, and where the range ends."""
        doing, link = f"reading {self.uri}/{check_key(key)}", self.links.objects.get(key)
        if link is None:
            fix = f"it has those of pack {self.links.name}@{self.links.pack[:12]} alone; ask for links to what you need"
            raise NotFoundError(doing, found="no link to it in the file", fix=fix)
        end = link.size_bytes if length is None else start + length
        if max(start, end) > link.size_bytes:
            found, expected = f"{link.size_bytes} bytes", f"at least {max(start, end)} bytes"
            raise CorruptionError(doing, found=found, expected=expected)
        return doing, link, end

    def _range(self, doing: str, link: Link, start: int, length: int, into: Target | None = None) -> bytes:
        """One ranged GET, repeated while what is wrong may pass: its bytes; none where they went `into` a target."""
        context: dict[str, Any] = {}  # with the deadline of the request and its repeats
        for attempt in itertools.count(1):
            request = AWSRequest("GET", link.url.get_secret_value(), {"Range": f"bytes={start}-{start + length - 1}"})
            prepared = request.prepare()
            prepared.context = context  # type: ignore[attr-defined]  # the stubs lack it
            error: BotoCoreError | None = None
            try:
                with self._wire.receiving(into) if into is not None else contextlib.nullcontext():
                    answer = self._wire.send(prepared)
            except BotoCoreError as met:  # it names the address without its query
                error = met
            if error is None and answer.status_code not in TRANSIENT_STATUS:
                break
            if attempt >= self._attempts:
                found = str(error) if error else f"HTTP {answer.status_code} from {_host(link)}"
                fix = "check the network and the server, and that no proxy is needed; then run it again"
                raise StoreUnavailableError(doing, found=found, expected="an answer", fix=fix) from error
            time.sleep(back_off(attempt, self._backoff))
        data: bytes = answer.content
        self._check(doing, link, answer.status_code)
        if answer.status_code != 206 and (start, length) != (0, link.size_bytes):
            raise StoreUnfitError(doing, found="a whole object for a range of it", expected="ranged reads")
        total = str(answer.headers.get("Content-Range", f"/{link.size_bytes}")).rpartition("/")[2]
        if into is not None and answer.status_code != 206 and len(data) == length:
            into.fill(data)
        count = into.received if into is not None else len(data)
        if count != length or total != str(link.size_bytes):
            found = f"{count} bytes of an object of {total}"
            raise CorruptionError(doing, found=found, expected=f"{length} bytes of an object of {link.size_bytes}")
        return data

    def _check(self, doing: str, link: Link, status: int) -> None:
        """Say what a refusal means; the server's own words may hold the address, and are not shown."""
        found, ended = f"HTTP {status} from {_host(link)}", datetime.now(UTC) >= self.links.expires
        if status in (200, 206):
            return
        if status == 404:
            raise NotFoundError(doing, found=found, fix="ask for new links: the object was deleted")
        if status in (400, 401, 403):
            when = self.links.expires.isoformat(" ", "seconds")
            raise AccessDeniedError(
                doing,
                found=f"{found}; the links {'ended' if ended else 'end'} at {when}",
                expected="links that work",
                fix="ask for new links (`modelpress share`)"
                + (
                    "" if ended else ": these were changed, or the credentials that signed them ended or lost the right"
                ),
            )
        raise StoreError(doing, found=found, expected="HTTP 206", fix="ask for new links (`modelpress share`)")


def _host(link: Link) -> str:
    return urlsplit(link.url.get_secret_value()).netloc.rpartition("@")[2]


def _is_address(url: str) -> bool:
    """Whether a request can go there, so that none fails with words that show a part of it."""
    try:
        parts = urlsplit(url)
        legal = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return legal and all("!" <= character <= "~" for character in url)


def _read(path: Path) -> Links:
    doing = f"reading links from {path}"
    with local_errors(doing), path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    expected = "a file that `modelpress share` wrote"
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(doing, found=f"more than {MAX_FILE_BYTES} bytes", expected=expected)
    try:
        links = Links.model_validate(loads(data, doing))
    except CorruptionError:
        raise ConfigError(doing, found="no JSON object", expected=expected) from None  # its text may show a link
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in problem["loc"]) or "file"
        raise ConfigError(doing, found=f"{where}: {problem['msg']}", expected=expected) from None
    for key, link in links.objects.items():
        if not _is_address(link.url.get_secret_value()):
            found = f"no address of http or https for {key!r}"
            raise ConfigError(doing, found=found, expected=expected)
    return links
