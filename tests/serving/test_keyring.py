"""Who counts: one answer for all that does not, a named scope for what is not enough, and files that change."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from hypothesis import given
from hypothesis import strategies as st

from modelpress.access import SCOPES, KeyFile, add_key, new_key, revoke_keys
from modelpress.errors import ConfigError
from serving.keyring import ForbiddenError, Keyring, Sources, UnauthenticatedError, read_token
from serving.refusals import one_line
from serving.tokens import Issuer
from tests.serving.test_tokens import claims, pem

TOKEN = "0123456789abcdef" * 2
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def private(path: Path, text: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(text)
    return path


def refused(keyring: Keyring, authorization: str | None, *scopes: str) -> str:
    with pytest.raises(UnauthenticatedError) as caught:
        keyring.check(authorization, *scopes)
    assert caught.value.status == 401
    return one_line(caught.value)


def test_a_key_says_who_and_for_what(path: Path) -> None:
    key = add_key(path, "team-a", ["infer", "metrics"], None)
    keyring = Keyring(Sources(path))
    assert not keyring.is_open
    for scopes in ([], ["infer"], ["metrics"], ["admin", "infer"]):
        found = keyring.check(f"Bearer {key}", *scopes)
        assert (found.name, found.via, found.id) == ("team-a", "key", key.split("_")[1])
    assert keyring.check(f"bearer {key}").name == "team-a", "the scheme's letters may be small"


def test_a_key_that_is_not_for_this_is_told_what_is_needed(path: Path) -> None:
    key = add_key(path, "team-a", ["infer", "metrics"], None)
    with pytest.raises(ForbiddenError) as caught:
        Keyring(Sources(path)).check(f"Bearer {key}", "promote", "admin")
    assert one_line(caught.value) == "scope of the key: found infer, metrics; expected promote or admin"
    assert (caught.value.status, caught.value.who) == (403, "team-a")


def test_all_that_does_not_count_gets_one_answer(path: Path) -> None:
    """Nobody learns whether a key exists, was revoked or has expired."""
    good, past, taken = (new_key("team", ["infer"], NOW + DAY, NOW) for _ in range(3))
    kept = [
        good[1],
        past[1].model_copy(update={"expires": NOW}),
        taken[1].model_copy(update={"revoked": NOW + DAY}),
    ]
    path.write_bytes(KeyFile(keys=tuple(kept)).to_bytes())
    keyring = Keyring(Sources(path, private(path.with_name("token"), TOKEN)), now=NOW.timestamp)
    assert keyring.check(f"Bearer {good[0]}").name == "team"
    told = {
        refused(keyring, one, "infer")
        for one in (
            *(None, "", "Bearer", "Bearer ", f"Bearer  {good[0]}", f"Bearer {good[0]} ", f"Basic {good[0]}", good[0]),
            *(f"Bearer {past[0]}", f"Bearer {taken[0]}", f"Bearer {good[0][:-1]}", f"Bearer {good[0]}x"),
            *(
                f"Bearer {good[1].sha256}",
                f"Bearer {good[1].id}",
                f"Bearer {TOKEN[:-1]}",
                "Bearer \udcff",
                "Bearer a.b.c",
            ),
        )
    }
    assert len(told) == 1
    assert good[0] not in told.pop()


@given(st.text())
def test_no_text_is_a_key(text: str) -> None:
    keyring = _ONE.keyring()
    for authorization in (text, f"Bearer {text}"):
        refused(keyring, authorization, "infer")


class _One:
    """A keyring with every kind of source; made once."""

    def __init__(self) -> None:
        self._made: Keyring | None = None
        self.folder: Path | None = None

    def keyring(self) -> Keyring:
        assert self._made is not None
        return self._made

    def make(self, folder: Path) -> None:
        add_key(folder / "keys.json", "team", ["infer"], None)
        (folder / "provider.pem").write_bytes(pem(PROVIDER))
        sources = Sources(
            folder / "keys.json", private(folder / "token", TOKEN), folder / "provider.pem", Issuer("https://i", "a")
        )
        self._made = Keyring(sources)


_ONE = _One()
PROVIDER = ed25519.Ed25519PrivateKey.generate()


@pytest.fixture(scope="module", autouse=True)
def _made(tmp_path_factory: pytest.TempPathFactory) -> None:
    _ONE.make(tmp_path_factory.mktemp("keyring"))


def test_keys_tokens_and_providers_stand_side_by_side() -> None:
    keyring = _ONE.keyring()
    found = keyring.check(f"Bearer {TOKEN}", *SCOPES)
    assert (found.name, found.via, found.scopes) == ("token", "token", set(SCOPES))
    text = jwt.encode(claims(iss="https://i", aud="a"), PROVIDER, "EdDSA")
    assert keyring.check(f"Bearer {text}", "promote").name == "anna"
    with pytest.raises(ForbiddenError, match="admin"):
        keyring.check(f"Bearer {text}", "admin")


def test_without_files_everybody_is_somebody() -> None:
    keyring = Keyring(Sources())
    assert keyring.is_open
    for authorization in (None, "Bearer x"):
        assert keyring.check(authorization, "promote").via == "nobody"


def test_a_provider_without_its_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_bytes(pem(PROVIDER))
    for sources in (Sources(jwt_keys_file=tmp_path / "key.pem"), Sources(issuer=Issuer("https://i", "a"))):
        with pytest.raises(ConfigError, match="issuer and audience"):
            Keyring(sources)


def test_a_key_is_taken_and_revoked_while_it_runs(path: Path) -> None:
    first = add_key(path, "first", ["infer"], None)
    keyring = Keyring(Sources(path))
    second = add_key(path, "second", ["infer"], None)
    refused(keyring, f"Bearer {second}")
    keyring.refresh()
    assert keyring.check(f"Bearer {second}").name == "second"
    revoke_keys(path, "first")
    keyring.refresh()
    refused(keyring, f"Bearer {first}")


def test_a_check_looks_at_the_files_itself(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = add_key(path, "team", ["infer"], None)
    keyring = Keyring(Sources(path))
    revoke_keys(path, "team")
    late = keyring._next_look
    monkeypatch.setattr("serving.keyring.time.monotonic", lambda: late)
    refused(keyring, f"Bearer {key}")


def spoiled(path: Path) -> None:
    path.write_text("{")


@pytest.mark.parametrize("spoil", [spoiled, Path.unlink])
def test_a_file_that_was_spoiled_locks_nobody_out_and_says_so(
    path: Path, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    key = add_key(path, "team", ["infer"], None)
    keyring, sound = Keyring(Sources(path)), path.read_bytes()
    spoil(path)
    for _ in range(3):
        keyring.refresh()
        assert keyring.check(f"Bearer {key}").name == "team"
        assert keyring.stale is not None
    assert caplog.text.count("as it was before") == 1, "once, not each second"
    path.write_bytes(sound)
    keyring.refresh()
    assert keyring.stale is None


def test_a_link_that_leads_elsewhere_is_another_file(tmp_path: Path) -> None:
    """As Kubernetes changes what a secret holds."""
    first = add_key(tmp_path / "1.json", "first", ["infer"], None)
    second = add_key(tmp_path / "2.json", "second", ["infer"], None)
    link = tmp_path / "keys.json"
    link.symlink_to("1.json")
    keyring = Keyring(Sources(link))
    (tmp_path / "new").symlink_to("2.json")
    os.replace(tmp_path / "new", link)
    keyring.refresh()
    assert keyring.check(f"Bearer {second}").name == "second"
    refused(keyring, f"Bearer {first}")


def test_a_token_is_read_without_its_line_end(tmp_path: Path) -> None:
    assert read_token(private(tmp_path / "token", f"{TOKEN}\n")) == TOKEN


def open_to_all(path: Path) -> None:
    path.write_text(TOKEN)
    path.chmod(0o644)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (Path.unlink, "FileNotFoundError"),
        (lambda path: path.write_text(""), "0 characters"),
        (lambda path: path.write_text("short"), "5 characters"),
        (lambda path: path.write_text("two tokens in one file"), "white space"),
        (lambda path: path.write_text("ä" * 40), "UnicodeDecodeError"),
        (open_to_all, "everybody can read it"),
    ],
)
def test_a_file_that_holds_no_token_is_refused_without_showing_it(
    tmp_path: Path, write: Callable[[Path], object], words: str
) -> None:
    path = private(tmp_path / "token", "")
    write(path)
    with pytest.raises(ConfigError) as caught:
        read_token(path)
    assert words in str(caught.value)
    assert "MODELPRESS_SERVING_TOKEN_FILE" in str(caught.value)
    assert TOKEN not in str(caught.value)
