"""The settings on who may ask, how they are reached, and what is written down of them."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from modelpress.errors import ConfigError
from serving.keyring import Sources
from serving.tls import Certificate
from serving.tokens import Issuer


class AccessSettings(BaseSettings):
    """A part of `ServingSettings`."""

    model_config = SettingsConfigDict(use_attribute_docstrings=True)

    token_file: Path | None = None
    """File with one token that counts for every scope, for a machine of one person. See `keys_file` for others."""
    keys_file: Path | None = None
    """File of hashed keys, as `modelpress access` makes it. Read again when it changes."""
    jwt_keys_file: Path | None = None
    """Public keys of an identity provider (JSON Web Key Set, or PEM) whose tokens count. Read again when it changes."""
    jwt_keys_url: str = ""
    """Where the provider has them (its `jwks_uri`), in place of a file: https, or http on loopback. Fetched again every
    five minutes, and where a token names a key that is not known."""
    jwt_issuer: str = ""
    """What `iss` of such a token must be."""
    jwt_audience: str = ""
    """What `aud` of such a token must be, or hold."""
    jwt_models_claim: str = ""
    """The claim that names the models a token is for, with `*`; a token without it is for none. Empty: every token is
    for every model."""
    jwt_leeway_seconds: float = Field(default=30.0, ge=0, le=300)
    """How far the provider's clock and this one may be apart."""
    open: bool = False
    """Answer everybody without a key, also beyond this machine. Without keys and without this, only loopback is
    listened on."""
    rollback: bool = False
    """Let keys with the scope `promote` move a pointer back over HTTP. The server's credentials must be able to write
    pointers then, and sign them where a trust file asks for it."""
    promote: bool = False
    """Let keys with the scope `promote` move a pointer over HTTP to a pack that the gate let through. It takes the
    rights that `rollback` takes."""
    tls_cert_file: Path | None = None
    """The server's certificate and those behind it, PEM: with it, only TLS is spoken. Read again when it changes."""
    tls_key_file: Path | None = None
    """Its key, PEM, without a passphrase."""
    tls_client_ca_file: Path | None = None
    """Issuers of clients' certificates, PEM: with it, every client needs one."""
    head_seconds: float = Field(default=10.0, gt=0)
    """How long a client may take for the head of a request, and how long a connection may say nothing at first."""
    audit_file: Path | None = None
    """File that says, a JSON object a line, who changed what and who was refused. Unset: the log."""

    def sources(self) -> Sources:
        """Whose keys count.

        Raises:
            ConfigError: a setting without another that it needs, or with one that contradicts it.
        """
        keys = "JWT_KEYS_URL" if self.jwt_keys_url else "JWT_KEYS_FILE"
        jwt = {
            keys: self.jwt_keys_url or self.jwt_keys_file,
            "JWT_ISSUER": self.jwt_issuer,
            "JWT_AUDIENCE": self.jwt_audience,
        }
        missing = [f"MODELPRESS_SERVING_{name}" for name, value in jwt.items() if not value]
        if 0 < len(missing) < len(jwt):
            raise ConfigError(
                "reading whose tokens count", found=f"no {' and no '.join(missing)}", expected="all three"
            )
        if self.jwt_keys_url and self.jwt_keys_file:
            doing, found = "reading whose tokens count", "MODELPRESS_SERVING_JWT_KEYS_FILE and _JWT_KEYS_URL"
            raise ConfigError(doing, found=found, expected="one of them")
        issuer = None
        if not missing:
            issuer = Issuer(self.jwt_issuer, self.jwt_audience, self.jwt_leeway_seconds, self.jwt_models_claim)
        elif self.jwt_models_claim:
            doing, found = "reading whose tokens count", "MODELPRESS_SERVING_JWT_MODELS_CLAIM alone"
            raise ConfigError(doing, found=found, expected="keys of tokens, issuer and audience beside it")
        sources = Sources(self.keys_file, self.token_file, self.jwt_keys_file, issuer, self.jwt_keys_url or None)
        if self.open and sources.named:
            found = f"MODELPRESS_SERVING_OPEN, and keys in {', '.join(sources.named)}"
            raise ConfigError("reading who may ask", found=found, expected="keys, or everybody")
        return sources

    def certificate(self) -> Certificate | None:
        """What TLS is spoken with; None: none is.

        Raises:
            ConfigError: a setting without another that it needs, or files that can't be used.
        """
        if self.tls_cert_file and self.tls_key_file:
            return Certificate(self.tls_cert_file, self.tls_key_file, self.tls_client_ca_file)
        if self.tls_cert_file or self.tls_key_file or self.tls_client_ca_file:
            expected = "MODELPRESS_SERVING_TLS_CERT_FILE and MODELPRESS_SERVING_TLS_KEY_FILE"
            raise ConfigError("reading the settings of TLS", found="a part of them", expected=expected)
        return None

    def check_reach(self, host: str, sources: Sources) -> None:
        """Refuse to be reached by everybody where nobody said so.

        Raises:
            ConfigError: no keys, an address that others reach, and no `open`.
        """
        if sources.named or self.open or _is_loopback(host):
            return
        raise ConfigError(
            f"listening on {host}",
            found="no keys: everybody who reaches it would be answered",
            expected="keys, or an address of this machine alone (127.0.0.1)",
            fix="make keys with `modelpress access create` and name their file in MODELPRESS_SERVING_KEYS_FILE; where "
            "something in front asks for them, say --open (MODELPRESS_SERVING_OPEN=true)",
        )


def _is_loopback(host: str) -> bool:
    """Whether all that a name stands for is this machine; a name that stands for nothing is found out when bound."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except socket.gaierror:
        return True
    return all(ipaddress.ip_address(str(one).partition("%")[0]).is_loopback for one in found)
