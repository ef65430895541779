"""Commands on canaries: what they show, and how they end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelpress import pointer
from modelpress.canary import log, tally
from modelpress.store import Store
from tests.canary.states import CANARY, SHADOW, config, shadowed, split, state
from tests.cli.conftest import Run
from tests.serving.conftest import publish_pack, scale_model


@pytest.fixture
def packs(store: Store, tmp_path: Path) -> list[str]:
    """The champion, and a candidate whose canary is in its second step."""
    first = publish_pack(store, tmp_path / "one", scale_model(2.0), "scale")
    second = publish_pack(store, tmp_path / "two", scale_model(3.0), "scale", alias=None)
    made = state(1, config(SHADOW, CANARY), champion=first, candidate=second)
    log.write(store, "scale", made, 0, first)
    for server, steps in (("a", [shadowed(300, 3.0)]), ("b", [shadowed(100), split(8, errors=1, champion=9)])):
        tally.write(store, "scale", tally.new(made.id, server * 32, "taking part", steps))
    return [first, second]


def test_status_says_where_it_is_and_how_the_tests_stand(packs: list[str], run: Run) -> None:
    code, out, _ = run("canary", "status", "scale")
    assert code == 0
    assert f"pack {packs[1]} beside {packs[0]}: running" in out
    assert "step 2 of 2: canary, share 0.5; 8 of 10 requests by 2 servers" in out
    (errors,) = [line.split() for line in out.splitlines() if line.startswith("errors")]
    assert errors[:3] == ["errors", "open", "0.1250"]
    (disagreement,) = [line.split() for line in out.splitlines() if line.startswith("disagreement")]
    assert disagreement[1:3] == ["clear", "0.0075"]
    document = json.loads(run("canary", "status", "scale", "--json")[1])
    assert document["canary"]["candidate"] == packs[1]
    assert [step["step"] for step in document["steps"]] == [0, 1]
    assert document["steps"][0]["mirrored"] == 400
    assert {one["test"]: one["verdict"] for one in document["findings"]}["disagreement"] == "clear"


def test_abort_ends_it_in_the_store_and_a_second_one_finds_none(packs: list[str], store: Store, run: Run) -> None:
    code, out, _ = run("canary", "abort", "scale", "--reason", "too warm today")
    assert code == 0
    assert f"champion is {packs[0]}, as before" in out
    entry = pointer.current(store, "scale", "canary")
    assert entry is not None
    assert (entry.pack, entry.reason) == (packs[0], "canary: aborted")
    assert "too warm today" in run("canary", "status", "scale")[1]
    code, _, err = run("canary", "abort", "scale")
    assert (code, "none that runs" in err) == (8, True)
    assert "canary: aborted" in run("history", "scale", "--alias", "canary")[1]


def test_a_model_without_a_canary_has_none(store: Store, run: Run) -> None:
    code, _, err = run("canary", "status", "nobody")
    assert (code, "found: none" in err) == (8, True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: [{share: 2}]", "steps.0.share"),
        ("stepps: []", "legal here: steps, alpha"),
        ("- 1", "a mapping"),
        (None, "reading config"),
    ],
)
def test_a_wrong_config_is_told_before_anything_starts(tmp_path: Path, run: Run, text: str | None, said: str) -> None:
    path = tmp_path / "canary.yaml"
    if text is not None:
        path.write_text(text)
    code, _, err = run("promote", "scale", "--canary", str(path))
    assert (code, said in err) == (2, True), err


def test_an_override_and_a_canary_exclude_each_other(run: Run) -> None:
    code, _, err = run("promote", "scale", "--canary", "default", "--override", "I know", "--by", "me")
    assert (code, "--override" in err) == (2, True)
