"""Who may ask: a bearer token that every request must bring, but those for health."""

from __future__ import annotations

import hmac
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
from starlette.responses import Response

from modelpress.errors import ConfigError
from modelpress.nudge import PATH

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

OPEN = ("/v2/health/live", "/v2/health/ready", PATH)
"""Nudges bring a signature of their own."""
LEAST_CHARACTERS = 16


def read_token(path: Path) -> str:
    """The token in a file, without the white space around it.

    Raises:
        ConfigError: the file can't be read, others can read it, or it holds no token.
    """
    doing = f"reading the token that requests must bring, MODELPRESS_SERVING_TOKEN_FILE={path}"
    try:
        if path.stat().st_mode & 0o007:
            raise ConfigError(doing, found="everybody can read it", fix=f"chmod o-rwx {path}")
        token = path.read_bytes().decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(doing, found=type(error).__name__, expected="a file of ASCII text") from error
    if len(token) < LEAST_CHARACTERS or any(character.isspace() for character in token):
        found = f"{len(token)} characters" if len(token) < LEAST_CHARACTERS else "white space in it"
        raise ConfigError(
            doing, found=found, expected=f"at least {LEAST_CHARACTERS} in one piece", fix="openssl rand -hex 24"
        )
    return token


class Guard:
    """Answers 401 to a request without the token, before anything of it is read; as ASGI around the application."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._expected = app, f"Bearer {token}".encode("ascii")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["path"] in OPEN or self._may(scope):
            await self._app(scope, receive, send)
            return
        text = "this server asks for a token: send the header `Authorization: Bearer TOKEN`"
        headers = {"WWW-Authenticate": 'Bearer realm="modelpress"', "Connection": "close"}
        answer = Response(orjson.dumps({"error": text}), 401, headers, media_type="application/json")
        await answer(scope, receive, send)

    def _may(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)
