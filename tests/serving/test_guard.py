"""Every door by every key: who lacks the right one is refused before anything is read, and it is written down."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.routing import Route
from starlette.testclient import TestClient

from modelpress import nudge
from modelpress.access import SCOPES, KeyFile, new_key
from modelpress.store import open_store
from serving.audit import REFUSALS_A_MINUTE, Audit
from serving.guard import Guard
from serving.infer import TENANT, target
from serving.keyring import Keyring, Sources
from serving.main import ServingSettings, application
from serving.repository import Repository
from serving.scopes import ACTIONS, NEEDS, NOWHERE, Doors
from serving.tokens import Issuer
from tests.serving.conftest import publish_pack, scale_model
from tests.serving.test_tokens import claims, pem

NOW = datetime.now(UTC)
PROVIDER, STRANGER = ed25519.Ed25519PrivateKey.generate(), ed25519.Ed25519PrivateKey.generate()
OPEN = {"/v2/health/live", "/v2/health/ready", "/status", nudge.PATH}
"""A nudge has a signature of its own."""
ISSUER = Issuer("https://login.example.org", "modelpress")
SECRETS = ("Traceback", ".py", "/store", "file://", "mpk_", "keys.json")


@dataclass
class House:
    """A guarded application over one real pack, and keys of every kind."""

    guard: Guard
    client: TestClient
    keys: dict[str, str]
    """By scope, one that is for it alone; and those that do not count, by what is wrong with them."""
    audit: Path
    pack: str

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.audit.read_text().splitlines()]

    def path(self, template: str) -> str:
        return template.replace("{name}", "scale").replace("{version}", self.pack)

    def ask(self, method: str, path: str, *authorizations: str) -> httpx.Response:
        headers = httpx.Headers([("Authorization", one) for one in authorizations])
        content = b"{}" if method in ("POST", "PUT") else None
        return self.client.request(method, path, headers=headers, content=content, follow_redirects=False)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    store = open_store(str(folder / "store"))
    pack = publish_pack(store, folder, scale_model(2.0), "scale")
    repository = Repository(store, ["scale"], threads=1)
    repository.start()
    made = {scope: new_key(f"only-{scope}", [scope], None, NOW) for scope in SCOPES}
    past, taken = (new_key("gone", list(SCOPES), NOW + timedelta(days=1), NOW) for _ in range(2))
    others = new_key("others", list(SCOPES), None, NOW, ["other", "team-*"])
    kept = [key for _, key in (*made.values(), others)]
    kept += [past[1].model_copy(update={"expires": NOW}), taken[1].model_copy(update={"revoked": NOW})]
    (folder / "keys.json").write_bytes(KeyFile(keys=tuple(kept)).to_bytes())
    (folder / "provider.pem").write_bytes(pem(PROVIDER))
    keyring = Keyring(Sources(folder / "keys.json", jwt_keys_file=folder / "provider.pem", issuer=ISSUER))
    audit = Audit(folder / "audit.jsonl")
    settings = ServingSettings(poll_seconds=0, workers=1, rollback=True, promote=True)
    guard = application(repository, settings, keyring, audit)
    keys = {scope: text for scope, (text, _) in made.items()}
    yield House(
        guard,
        TestClient(guard),
        keys | {"expired": past[0], "revoked": taken[0], "others": others[0]},
        folder / "audit.jsonl",
        pack,
    )
    audit.close()


def routes(house: House) -> list[tuple[str, str]]:
    found = []
    for route in house.guard._app.routes:
        assert isinstance(route, Route)
        found += [(method, route.path) for method in sorted(route.methods or {"GET"})]
    return found


def credentials(house: House) -> dict[str, tuple[str, ...]]:
    """What does not count, by what is wrong with it."""
    good, everything = house.keys["admin"], " ".join(SCOPES)
    token = jwt.encode(claims(scope=everything), PROVIDER, "EdDSA")
    return {
        "nothing": (),
        "empty": ("",),
        "no key": ("Bearer",),
        "another scheme": (f"Basic {good}",),
        "no scheme": (good,),
        "a letter less": (f"Bearer {good[:-1]}",),
        "a letter more": (f"Bearer {good}x",),
        "unknown": (f"Bearer {new_key('x', ['infer'], None, NOW)[0]}",),
        "expired": (f"Bearer {house.keys['expired']}",),
        "revoked": (f"Bearer {house.keys['revoked']}",),
        "two": (f"Bearer {good}", f"Bearer {good}"),
        "a good one behind a wrong one": ("Bearer x", f"Bearer {good}"),
        "a stranger's token": (f"Bearer {jwt.encode(claims(scope=everything), STRANGER, 'EdDSA')}",),
        "a token for others": (f"Bearer {jwt.encode(claims(scope=everything, aud='x'), PROVIDER, 'EdDSA')}",),
        "a token that has ended": (f"Bearer {jwt.encode(claims(scope=everything, exp=1), PROVIDER, 'EdDSA')}",),
        "a token cut short": (f"Bearer {token.rpartition('.')[0]}.",),
    }


def test_every_route_has_its_scope_and_every_scope_its_route(house: House) -> None:
    assert {path for _, path in routes(house)} == set(NEEDS)
    assert set(ACTIONS) <= set(NEEDS)
    assert {path for path, needs in NEEDS.items() if needs is None} <= OPEN, "what is open is open on purpose"


def test_a_route_without_a_scope_keeps_the_server_from_starting() -> None:
    async def endpoint(_: object) -> None: ...

    with pytest.raises(ValueError, match=r"no scope: add it to serving\.scopes"):
        Doors([Route("/v2/new", endpoint)])


def test_what_does_not_count_opens_no_door(house: House) -> None:
    for method, path in [*routes(house), ("GET", "/nowhere"), ("GET", "/v2/health/live/"), ("POST", "/v2/../metrics")]:
        if NEEDS.get(path, ()) is None:
            continue
        for wrong, authorizations in credentials(house).items():
            answer = house.ask(method, house.path(path), *authorizations)
            assert answer.status_code == 401, (method, path, wrong)
            assert answer.headers["www-authenticate"] == 'Bearer realm="modelpress"'
            assert not [secret for secret in SECRETS if secret in answer.text]


def test_a_key_opens_what_it_is_for_and_nothing_else(house: House) -> None:
    for method, path in routes(house):
        needs = NEEDS[path]
        if path == nudge.PATH:  # no key counts there: it asks for a signature
            answer = house.ask(method, path, f"Bearer {house.keys['admin']}")
            assert (answer.status_code, "no signature of ours" in answer.json()["error"]) == (401, True)
            continue
        for scope in SCOPES:
            answer = house.ask(method, house.path(path), f"Bearer {house.keys[scope]}")
            token = jwt.encode(claims(scope=scope), PROVIDER, "EdDSA")
            with_token = house.ask(method, house.path(path), f"Bearer {token}")
            if needs is None or scope in needs:
                assert answer.status_code not in (401, 403), (method, path, scope)
                assert with_token.status_code not in (401, 403), (method, path, scope)
            else:
                assert answer.status_code == with_token.status_code == 403, (method, path, scope)
                if method != "HEAD":
                    assert answer.json()["error"].endswith(f"expected {' or '.join(needs)}")
        house.ask("POST", "/v2/repository/models/scale/load", f"Bearer {house.keys['admin']}")


def test_a_key_for_other_models_opens_no_door_of_this_one(house: House) -> None:
    for method, path in routes(house):
        answer = house.ask(method, house.path(path), f"Bearer {house.keys['others']}")
        named = "{name}" in path
        assert (answer.status_code == 403) == named, (method, path)
        if named and method != "HEAD":
            assert answer.json()["error"] == "model 'scale': found a key for others; expected other, team-*"
    there = house.path("/v2/models/{name}").replace("scale", "team-1")
    assert house.ask("GET", there, f"Bearer {house.keys['others']}").status_code == 404, "it may ask, and there is none"
    assert house.ask("POST", "/v2/models/scale:processed/infer", f"Bearer {house.keys['others']}").status_code == 403


def test_health_is_told_to_everybody(house: House) -> None:
    for path in ("/v2/health/live", "/v2/health/ready"):
        for authorizations in credentials(house).values():
            assert house.ask("GET", path, *authorizations).status_code == 200


segments = st.text(st.characters(codec="ascii", min_codepoint=32), max_size=12)


@given(
    st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"]),
    st.one_of(
        st.lists(segments, max_size=6).map(lambda parts: "/" + "/".join(parts)),
        st.tuples(st.sampled_from(sorted(NEEDS)), segments).map(lambda pair: pair[0].replace("{name}", pair[1])),
    ),
    st.one_of(st.none(), segments, segments.map(lambda text: f"Bearer {text}")),
)
@example("GET", "/v2/health/live\n", None)
@example("GET", "//v2/health/live", None)
@example("GET", "/V2/HEALTH/LIVE", None)
@example("POST", "/v2/models/a/b/infer", None)
def test_no_path_leads_around_the_guard(house: House, method: str, path: str, authorization: str | None) -> None:
    """Below HTTP, so that no client mends the path: what is neither open nor asked with a key gets 401."""
    if path.removesuffix("\n") in OPEN:  # the application's own pattern takes the line end, too
        return
    headers = [] if authorization is None else [(b"authorization", authorization.encode())]
    scope = {"type": "http", "method": method, "path": path, "root_path": "", "headers": headers, "query_string": b""}
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        raise AssertionError("nothing is read of it")

    asyncio.run(house.guard(scope, receive, send))
    assert sent[0]["status"] == 401


@given(st.lists(st.one_of(st.sampled_from(["v2", "models", "versions", "infer", "", "a\n"]), segments), max_size=8))
@example(["", "v2", "models", "a", "infer"])
@example(["", "v2", "models", "a", "versions", "b", "infer"])
@example(["", "v2", "models", "\n", "infer"])
def test_what_is_taken_for_inference_needs_its_scope(house: House, parts: list[str]) -> None:
    """The application takes these paths past its routes, by code of its own."""
    for path in ("/".join(parts), "/v2/models/" + "/".join([*parts, "infer"])):
        if target(path) is not None:
            assert house.guard._doors.find(path).needs == ("infer",)


def test_only_the_app_s_own_patterns_find_a_door(house: House) -> None:
    doors = house.guard._doors
    assert doors.find("/v2/models/a/infer").parameters == {"name": "a"}
    assert doors.find("/v2/repository/models/a/load").needs == ("admin",)
    for path in ("", "/", "/v2/", "/v2/models", "/v2/models//infer", "/v2/models/a/infer/", "/x/v2/health/live"):
        assert doors.find(path) == NOWHERE


async def asgi(guard: Guard, kind: str) -> list[Any]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    await guard({"type": kind, "path": "/v2/models/scale/infer", "headers": []}, receive, send)
    return sent


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_other_protocols_get_no_answer(house: House) -> None:
    assert await asgi(house.guard, "websocket") == []


def test_a_refusal_is_written_down_without_the_key(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        house.guard._audit, "_clock", lambda: 0.0
    )  # a minute of its own: others refuse more than it lists
    before = len(house.lines())
    house.ask("POST", "/v2/repository/models/scale/unload", "Bearer mpk_wrong")
    house.ask("POST", "/v2/repository/models/scale/unload", f"Bearer {house.keys['infer']}")
    first, second = house.lines()[before:]
    assert (first["who"], first["status"], first["outcome"]) == (None, 401, "refused")
    assert (second["who"], second["status"], second["outcome"]) == ("only-infer", 403, "refused")
    assert first["asked"] == "POST /v2/repository/models/scale/unload"
    assert first["from"] == "testclient"
    assert "mpk_" not in house.audit.read_text()


def test_what_is_changed_is_written_down_and_what_is_asked_is_not(house: House) -> None:
    before = len(house.lines())
    admin = f"Bearer {house.keys['admin']}"
    house.ask("POST", "/v2/repository/models/scale/unload", admin)
    house.ask("POST", "/v2/repository/models/scale/load", admin)
    house.ask("POST", "/v2/repository/models/nobody/load", admin)
    house.ask("GET", "/v2/models/scale", admin)
    found = house.lines()[before:]
    assert [(one["action"], one["model"], one["status"], one["outcome"]) for one in found] == [
        ("unload", "scale", 200, "done"),
        ("load", "scale", 200, "done"),
        ("load", "nobody", 404, "refused"),
    ]
    assert {(one["who"], one["via"], one["from"]) for one in found} == {("only-admin", "key", "testclient")}
    assert all(one["key"] == house.keys["admin"].split("_")[1] for one in found)


def test_who_knocks_at_an_open_door_fills_no_disk(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A nudge brings a signature of its own, or none: without one it is refused behind the guard."""
    monkeypatch.setattr(house.guard._audit, "_clock", lambda: 60.0)  # all of it within a minute
    before = len(house.lines())
    for _ in range(REFUSALS_A_MINUTE + 20):
        assert house.client.post("/v2/repository/nudge", content=b"{}").status_code >= 400
    assert len(house.lines()) - before == REFUSALS_A_MINUTE
    assert house.lines()[-1]["outcome"] == "refused"


def opened(house: House, *, tenant: Callable[[str], None] = lambda _: None) -> TestClient:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            tenant(scope[TENANT])
        await house.guard._app(scope, receive, send)

    app.routes = house.guard._app.routes  # type: ignore[attr-defined]
    return TestClient(Guard(app, Keyring(Sources()), house.guard._audit, house.guard._metrics))  # type: ignore[arg-type]


def test_without_keys_everybody_is_answered_and_has_a_name(house: House) -> None:
    found: list[str] = []
    assert opened(house, tenant=found.append).get("/v2/models/scale").status_code == 200
    assert found == ["anonymous"]


@pytest.mark.parametrize(
    ("site", "status"), [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)]
)
def test_without_keys_no_page_of_others_may_ask(house: House, site: str, status: int) -> None:
    client = opened(house)
    answer = client.post("/v2/repository/index", headers={"Sec-Fetch-Site": site})
    assert answer.status_code == status
    assert client.get("/v2/health/live", headers={"Sec-Fetch-Site": site}).status_code == 200


BODIES = [b"", b"{", b"[]", b"\xff", b'{"inputs": 1}', b"x" * 5000, b'{"to": "../../etc/passwd"}']
NAMES = ["scale", "nobody", "..", "%2e%2e%2f", "a" * 300, "\r\nx: y", "<script>", "\udcff", "Traceback"]


def test_whatever_is_asked_shows_no_traceback_and_no_path(house: House) -> None:
    for method, template in routes(house):
        needs = NEEDS[template]
        key = f"Bearer {house.keys[needs[0] if needs else 'infer']}"
        for name in NAMES:
            path = template.replace("{name}", quote(name, errors="surrogateescape")).replace("{version}", house.pack)
            for content in BODIES if method == "POST" else [b""]:
                answer = house.client.request(method, path, headers={"Authorization": key}, content=content)
                assert answer.status_code != 500, (method, path, content)
                if template != "/status":
                    assert not [secret for secret in SECRETS if secret in answer.text.replace(name, "")]
    house.ask("POST", "/v2/repository/models/scale/load", f"Bearer {house.keys['admin']}")


def test_an_unforeseen_error_behind_any_door_shows_nothing(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Any:
        raise ZeroDivisionError("in /secret/place.py")

    for name in ("model", "models", "load", "unload", "index"):
        monkeypatch.setattr(Repository, name, broken)
    monkeypatch.setattr(Repository, "ready", property(broken))
    client = TestClient(house.guard, raise_server_exceptions=False)
    found = set()
    for method, template in routes(house):
        needs = NEEDS[template]
        headers = {"Authorization": f"Bearer {house.keys[needs[0] if needs else 'infer']}"}
        answer = client.request(method, house.path(template), headers=headers)
        assert "secret" not in answer.text
        assert "ZeroDivision" not in answer.text
        if answer.status_code == 500:
            found.add(template)
    assert len(found) > 8, "it does reach what is broken"
    last = house.lines()[-1]
    assert (last["outcome"], last["status"]) == ("failed", 500)
