"""TLS: certificate and key from files, read again when they change; clients' certificates where they are asked for."""

from __future__ import annotations

import logging
import os
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

from modelpress.errors import ConfigError

log = logging.getLogger("modelpress.serving")

LOOK_SECONDS = 5.0


@dataclass(frozen=True)
class Pem:
    """Files as they were read, for who does not take Python's context of TLS."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None


class Certificate:
    """The server's side of TLS: 1.2 or newer, by OpenSSL's own choice of ciphers as Python sets it.

    Args:
        certificate: PEM, the server's certificate first, then those that lead to its issuer.
        key: PEM, without a passphrase, and not for everybody to read.
        client_ca: PEM; clients must bring a certificate that one of these issued. None: they need none.

    Raises:
        ConfigError: a file can't be read, or they don't fit together.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None = None) -> None:
        self._certificate, self._key, self._client_ca = certificate, key, client_ca
        self._seen = self._look()
        self.context = self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        """For the listener; new connections go on with the newest."""
        self._newest = self.context
        self.context.sni_callback = self._take_newest
        self.pem = self._bytes()
        """The same for gRPC."""

    def refresh(self) -> None:
        """Take the certificate that stands in the files now, for connections from now on.

        Files that can't be read, or don't fit together (one was replaced and the other not yet), change nothing and are
        logged. Clients' issuers are read at the start alone: a context only ever learns more of them.
        """
        seen = self._look()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            loaded, pem = self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)), self._bytes()
        except (ConfigError, OSError) as error:  # ssl.SSLError is an OSError
            log.error("the certificate is as it was before: %s", error)
            return
        self._newest, self.pem = loaded, pem
        log.info("read the certificate %s again", self._certificate)

    def _take_newest(self, line: ssl.SSLObject, _name: str, _context: ssl.SSLContext) -> None:
        # Asked at each handshake. To load into the context that runs would leave it without a key for a moment.
        line.context = self._newest

    def _load(self, context: ssl.SSLContext) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        doing = f"reading the server's certificate {self._certificate} and its key {self._key}"
        try:
            if os.name == "posix" and self._key.stat().st_mode & 0o007:
                raise ConfigError(doing, found="a key that everybody can read", fix=f"chmod o-rwx {self._key}")
            context.load_cert_chain(self._certificate, self._key, password="")  # else it would ask a terminal
            if self._client_ca is not None:
                doing = f"reading who issues clients' certificates, {self._client_ca}"
                context.load_verify_locations(self._client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except OSError as error:
            expected = "PEM: a certificate and the key that it is of, without a passphrase"
            raise ConfigError(doing, found=error.strerror or str(error), expected=expected) from error
        return context

    def _bytes(self) -> Pem:
        client_ca = self._client_ca.read_bytes() if self._client_ca is not None else None
        return Pem(self._certificate.read_bytes(), self._key.read_bytes(), client_ca)

    def _look(self) -> list[tuple[int, int, int] | None]:
        return [fingerprint(path) for path in (self._certificate, self._key)]


class Refresher(threading.Thread):
    """Looks at the files of a certificate every `LOOK_SECONDS`, until the end of the process."""

    def __init__(self, certificate: Certificate) -> None:
        super().__init__(name="certificate", daemon=True)
        self._certificate, self._stopped = certificate, threading.Event()

    def run(self) -> None:
        """The thread's work."""
        while not self._stopped.wait(LOOK_SECONDS):
            self._certificate.refresh()

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()


def fingerprint(path: Path) -> tuple[int, int, int] | None:
    """What tells that another file stands under this name, also behind a link; None where there is none."""
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_ino, info.st_mtime_ns, info.st_size
