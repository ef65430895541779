"""Keys: made once, kept as digests, revoked, and a file that is never half written."""

from __future__ import annotations

import json
import stat
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpress.access import SCOPES, KeyFile, Principal, add_key, digest, new_key, parse_expiry, read_keys, revoke_keys
from modelpress.errors import AccessDeniedError, ConfigError, NotFoundError

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
DAY = timedelta(days=1)


def test_the_file_holds_all_of_a_key_but_the_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    text = add_key(path, "team-a", ["infer", "metrics", "infer"], NOW + 3650 * DAY)
    (key,) = read_keys(path).keys
    assert (key.name, key.scopes, key.revoked) == ("team-a", ("infer", "metrics"), None)
    assert key.models == ("*",)
    assert text.startswith(f"mpk_{key.id}_")
    assert bytes.fromhex(key.sha256) == digest(text)
    secret = text.removeprefix(f"mpk_{key.id}_")
    assert len(secret) == 43  # 32 bytes, url-safe
    assert secret not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert add_key(path, "team-a", ["infer"], None) != text, "a second key of one name: for a change"
    assert [key.name for key in read_keys(path).keys] == ["team-a", "team-a"]


@pytest.mark.parametrize(
    ("name", "scopes", "expires", "words"),
    [
        ("", ["infer"], None, "name"),
        ("Team A", ["infer"], None, "name"),
        ("x" * 65, ["infer"], None, "name"),
        ("team\n", ["infer"], None, "name"),
        ("team", [], None, "scopes"),
        ("team", ["root"], None, "scopes"),
        ("team", ["infer"], NOW, "an end at"),
        ("team", ["infer"], NOW - DAY, "an end at"),
    ],
)
def test_an_illegal_key_is_refused(name: str, scopes: list[str], expires: datetime | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        new_key(name, scopes, expires, NOW)


def test_a_key_counts_until_its_end_and_not_at_it() -> None:
    _, key = new_key("team", ["infer"], NOW + DAY, NOW)
    assert key.state(NOW + DAY - timedelta(microseconds=1)) == "counts"
    assert key.state(NOW + DAY).startswith("expired")
    assert key.model_copy(update={"revoked": NOW + 900 * DAY}).state(NOW).startswith("revoked"), "whatever the date"


def test_revoking_by_id_takes_one_and_by_name_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    for name in ("a", "a", "b"):
        add_key(path, name, ["infer"], None)
    first, second, other = read_keys(path).keys
    assert [key.id for key in revoke_keys(path, first.id)] == [first.id]
    assert [key.id for key in revoke_keys(path, "a")] == [second.id], "what is revoked stays as it was"
    assert [key.revoked is None for key in read_keys(path).keys] == [False, False, True]
    for which in ("a", first.id, "nobody", other.sha256):
        with pytest.raises(NotFoundError, match="one of b"):
            revoke_keys(path, which)


@pytest.mark.parametrize(
    ("patterns", "model", "may"),
    [
        (["*"], "anything", True),
        (["digits"], "digits", True),
        (["digits"], "digits:processed", True),
        (["digits"], "digits2", False),
        (["digits"], "DIGITS", False),
        (["team-a-*", "digits"], "team-a-1", True),
        (["team-a-*"], "team-b-1", False),
        (["team-a-*"], "x/team-a-1", False),
        (["a*c"], "abc", True),
        (["a.c"], "abc", False),
        (["digits"], "other:digits", False),
        (["digits"], "", False),
    ],
)
def test_a_key_is_for_models_by_name(patterns: list[str], model: str, may: bool) -> None:
    _, key = new_key("team", ["infer"], None, NOW, patterns)
    assert Principal("team", frozenset(), "key", key.id, key.models).may_ask(model) is may


@pytest.mark.parametrize("patterns", [[], [""], ["Digits"], ["a b"], ["a[b]"], ["x" * 65], ["?"]])
def test_illegal_names_of_models_are_refused(patterns: list[str]) -> None:
    with pytest.raises(ConfigError, match="models"):
        new_key("team", ["infer"], None, NOW, patterns)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90d", NOW + 90 * DAY),
        ("12h", NOW + DAY / 2),
        ("30m", NOW + timedelta(minutes=30)),
        ("never", None),
        ("2027-01-31T00:00:00Z", datetime(2027, 1, 31, tzinfo=UTC)),
        ("2027-01-31", datetime(2027, 1, 31, tzinfo=UTC)),
    ],
)
def test_ends(text: str, expected: datetime | None) -> None:
    assert parse_expiry(text, NOW) == expected


@pytest.mark.parametrize("text", ["", "90", "d", "-1d", "1y", "999999d", "soon", "2027-13-01", "Never"])
def test_what_is_no_end(text: str) -> None:
    with pytest.raises(ConfigError, match="when a key ends"):
        parse_expiry(text, NOW)


def written(change: Callable[[dict[str, object]], object]) -> Callable[[Path], object]:
    def write(path: Path) -> object:
        document = KeyFile(keys=(new_key("team", ["infer"], None, NOW)[1],)).model_dump(mode="json")
        change(document)
        return path.write_text(json.dumps(document))

    return write


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda _: None, "No such file"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.write_text("{"), "strict JSON"),
        (lambda path: path.write_text("[]"), "a JSON object"),
        (lambda path: path.write_bytes(b"\xff"), "strict JSON"),
        (lambda path: path.write_text('{"keys": [], "keys": []}'), "stands 2 times"),
        (lambda path: path.write_bytes(b" " * (2**23 + 1)), "more than"),
        (written(lambda document: document.update(format_version=2)), "format_version"),
        (written(lambda document: document.update(more=1)), "more"),
        (written(lambda document: document["keys"][0].update(scopes=["root"])), "scopes"),
        (written(lambda document: document["keys"][0].update(scopes=[])), "scopes"),
        (written(lambda document: document["keys"][0].pop("revoked")), "revoked"),
        (written(lambda document: document["keys"][0].update(revoked="yes")), "revoked"),
        (written(lambda document: document["keys"][0].update(expires="2027-01-01T00:00:00")), "expires"),
        (written(lambda document: document["keys"][0].update(sha256="mpk_secret")), "sha256"),
        (written(lambda document: document["keys"].append(document["keys"][0])), "the same id"),
    ],
)
def test_a_file_that_says_something_else_is_refused(
    tmp_path: Path, write: Callable[[Path], object], words: str
) -> None:
    path = tmp_path / "keys.json"
    write(path)
    with pytest.raises(ConfigError, match=words) as caught:
        read_keys(path)
    assert "mpk_secret" not in str(caught.value), "a key that was put there by mistake is shown to nobody"


def test_a_file_that_everyone_may_change_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add_key(path, "team", ["infer"], None)
    path.chmod(0o602)
    with pytest.raises(ConfigError, match="chmod o-w"):
        read_keys(path)


def test_its_rights_stay_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add_key(path, "team", ["infer"], None)
    path.chmod(0o640)
    add_key(path, "other", ["infer"], None)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert not [one.name for one in tmp_path.iterdir() if "partial" in one.name]


def test_a_broken_file_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text("{")
    with pytest.raises(ConfigError):
        add_key(path, "team", ["infer"], None)
    assert path.read_text() == "{"


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises((NotFoundError, AccessDeniedError), match="file of keys"):
        add_key(tmp_path / "none" / "keys.json", "team", ["infer"], None)


def test_two_who_change_it_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    threads = [
        threading.Thread(target=lambda: [add_key(path, "team", ["infer"], None) for _ in range(5)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_keys(path).keys) == 20


@given(
    st.lists(st.sampled_from(SCOPES), min_size=1), st.datetimes(min_value=datetime(2027, 1, 1), timezones=st.just(UTC))
)
def test_what_is_written_is_read(scopes: list[str], expires: datetime) -> None:
    _, key = new_key("team", scopes, expires, NOW)
    known = KeyFile(keys=(key,))
    assert KeyFile.model_validate_json(known.to_bytes()) == known
    assert set(key.scopes) == set(scopes)
