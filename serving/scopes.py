"""Which key each door needs. A door that is not in the table keeps the server from starting."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from starlette.routing import BaseRoute, Route

from modelpress.access import SCOPES

Needs = tuple[str, ...] | None

EVERYBODY: Needs = None
"""Health, for those who watch the process, the status page, which is a form without data, and nudges, which bring a
signature of their own and make the server look at a pointer."""
ANY: Needs = SCOPES
USERS: Needs = ("infer", "admin", "promote")
WATCHERS: Needs = ("metrics", "admin", "promote")

NEEDS: dict[str, Needs] = {
    "/v2/models/{name}/infer": ("infer",),
    "/v2/models/{name}/versions/{version}/infer": ("infer",),
    "/v2/health/live": EVERYBODY,
    "/v2/health/ready": EVERYBODY,
    "/v2/models/{name}/ready": USERS,
    "/v2/models/{name}/versions/{version}/ready": USERS,
    "/v2/models/{name}": USERS,
    "/v2/models/{name}/versions/{version}": USERS,
    "/v2": ANY,
    "/v2/openapi.json": ANY,
    "/v2/repository/index": USERS,
    "/v2/repository/models/{name}/load": ("admin",),
    "/v2/repository/models/{name}/unload": ("admin",),
    "/v2/repository/models/{name}/rollback": ("promote",),
    "/v2/repository/models/{name}/promote": ("promote",),
    "/v2/repository/nudge": EVERYBODY,
    "/metrics": ("metrics",),
    "/v2/status": WATCHERS,
    "/status": EVERYBODY,
}
"""By the path of the route: one of these scopes is needed. None: no key at all."""

ACTIONS: dict[str, str] = {
    "/v2/repository/models/{name}/load": "load",
    "/v2/repository/models/{name}/unload": "unload",
    "/v2/repository/models/{name}/rollback": "rollback",
    "/v2/repository/models/{name}/promote": "promote",
    "/v2/repository/nudge": "nudge",
}
"""Doors behind which something is changed, and what the audit calls it."""


MAX_KNOWN, MAX_KNOWN_CHARACTERS = 1024, 256
"""Paths whose door is remembered; all are forgotten when there are more."""


class Door(NamedTuple):
    """Where a request goes, before anything of it is read."""

    path: str
    """The route's, with its parameters by name; empty: no route of ours."""
    needs: Needs
    """Scopes of which one is needed; None: no key."""
    parameters: dict[str, str]
    """Of the path."""


NOWHERE = Door("", ANY, {})
"""Who asks for what is not there needs a key as well: the doors that there are are nobody else's business."""


@dataclass(frozen=True)
class _Way:
    pattern: re.Pattern[str]
    path: str
    needs: Needs


class Doors:
    """The application's routes with what each needs, in the order in which the application looks at them.

    Args:
        routes: the application's.

    Raises:
        ValueError: one is missing from `NEEDS`. That is a fault of ours, found by the first test that starts a server.
    """

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        self._ways: list[_Way] = []
        self._known: dict[str, Door] = {}
        for route in routes:
            if not isinstance(route, Route) or route.path not in NEEDS:
                raise ValueError(f"{route!r} has no scope: add it to serving.scopes.NEEDS")
            # The route's own pattern: there is no path that it takes and the guard does not.
            self._ways.append(_Way(route.path_regex, route.path, NEEDS[route.path]))

    def find(self, path: str) -> Door:
        """The door of a path."""
        door = self._known.get(path)
        if door is not None:
            return door
        for way in self._ways:
            if match := way.pattern.match(path):
                door = Door(way.path, way.needs, match.groupdict())
                if len(path) <= MAX_KNOWN_CHARACTERS:  # those that are asked for again and again
                    if len(self._known) >= MAX_KNOWN:
                        self._known.clear()
                    self._known[path] = door
                return door
        return NOWHERE
