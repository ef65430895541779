"""How often a run may start again by itself, by its tags."""

from __future__ import annotations

import pytest

from tasks.restarts import asked


@pytest.mark.parametrize(
    ("tags", "often"),
    [
        ([], 0),
        (["modelpress", "restarts"], 0),
        (["restarts:3", "cpu"], 3),
        (["restarts: 2"], 2),
        (["restarts:0"], 0),
        (["restarts:20"], 20),
        (["restarts:21"], 0),
        (["restarts:-1"], 0),
        (["restarts:many"], 0),
        (["restarts:²"], 0),
        (["restarts:1", "restarts:5"], 0),
    ],
)
def test_a_tag_says_how_often_and_what_is_no_number_is_told(
    tags: list[str], often: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert asked(tags) == often
    wrong = often == 0 and any(tag.startswith("restarts:") for tag in tags) and tags != ["restarts:0"]
    assert ("expected one tag" in caplog.text) == wrong
