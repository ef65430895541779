"""How this server is: `GET /v2/status` for programs, `GET /status` for people.

The page is one file without a build and without a request to elsewhere. It holds no data: what it shows it asks for
with the key that is typed into it.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import resources
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from modelpress import __version__
from modelpress.access import Principal
from serving.canary import Canaries
from serving.guard import PRINCIPAL
from serving.keyring import Keyring
from serving.metrics import Metrics, lag
from serving.repository import Repository, ServedModel, index_row

MAX_CHECKS = 50
MAX_REASON_CHARACTERS = 500


class Status:
    """The two doors.

    Args:
        repository: what is served.
        metrics: what was counted.
        keyring: who counts.
        canaries: of the models.
        rollback: whether pointers may be moved back here.
    """

    def __init__(
        self, repository: Repository, metrics: Metrics, keyring: Keyring, canaries: Canaries, *, rollback: bool
    ) -> None:
        self._repository, self._metrics, self._keyring = repository, metrics, keyring
        self._canaries, self._rollback = canaries, rollback
        self._started = datetime.now(UTC)
        self._page = resources.files("serving").joinpath("status.html").read_bytes()
        self._headers = _page_headers(self._page)

    def routes(self) -> list[Route]:
        """For the application."""
        return [Route("/v2/status", self.data), Route("/status", self.page)]

    async def page(self, _request: Request) -> Response:
        """`GET /status`."""
        return Response(self._page, headers=self._headers, media_type="text/html; charset=utf-8")

    async def data(self, request: Request) -> Response:
        """`GET /v2/status`."""
        you: Principal = request.scope[PRINCIPAL]
        lost = self._repository.lost
        document = {
            "you": {"name": you.name, "scopes": sorted(you.scopes) if you.via != "nobody" else ["metrics"]},
            "server": {
                "version": __version__,
                "started": self._started.isoformat(),
                "time": datetime.now(UTC).isoformat(),
                "ready": self._repository.ready,
                "rollback": self._rollback,
                "access_stale": self._keyring.stale is not None,
            },
            "store": {"reachable": lost is None, "since": lost.isoformat() if lost else None},
            "requests": {"in_flight": self._metrics.in_flight, "waiting": self._metrics.waiting},
            "models": [self._model(model) for model in self._repository.models()],
        }
        return Response(orjson.dumps(document), media_type="application/json", headers={"Cache-Control": "no-store"})

    def _model(self, model: ServedModel) -> dict[str, Any]:
        row, loaded = index_row(model), model.loaded
        found: dict[str, Any] = {
            "name": model.name,
            "alias": model.alias,
            "state": row["state"],
            "reason": row.get("reason"),
            "pack": loaded.engine.pack if loaded else None,
            "behind": lag(model),
            "failed_loads": model.failed_loads,
            "latency": self._metrics.latency(model.name),
            "requests": self._metrics.outcomes(model.name),
            "canary": self._canaries.shown(model.name),
        }
        if loaded and (entry := loaded.pointer):
            moved = {"reason": entry.reason, "who": entry.who, "created": entry.created.isoformat()}
            found |= {"pointer": entry.number, "moved": moved, "provider": loaded.engine.provider}
            found |= {"gate": gate_of(entry.decision)}
        return found


def gate_of(decision: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What is shown of a decision, whatever version wrote it: `verdict`, and `checks` as far as they are there."""
    if not isinstance(decision, Mapping):
        return None
    checks = decision.get("checks")
    shown = [
        {name: str(check.get(name, ""))[:MAX_REASON_CHARACTERS] for name in ("name", "verdict", "reason")}
        for check in (checks if isinstance(checks, list) else [])
        if isinstance(check, Mapping)
    ]
    return {"verdict": str(decision.get("verdict", "unknown"))[:MAX_REASON_CHARACTERS], "checks": shown[:MAX_CHECKS]}


def _page_headers(page: bytes) -> dict[str, str]:
    """Only the page's own script and style run, only this server is asked, and nobody puts it into a frame."""
    hashes = {
        tag: " ".join(_hash(text) for text in re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), page, re.DOTALL))
        for tag in ("script", "style")
    }
    policy = {
        "default-src": "'none'",
        "script-src": hashes["script"],
        "style-src": hashes["style"],
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-store",
    }


def _hash(text: bytes) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"
