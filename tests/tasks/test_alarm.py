"""What is told of a row of failures."""

from __future__ import annotations

from tasks.alarm import Failure


def failure(in_a_row: int) -> Failure:
    return Failure(deployment="scrub", run="owl", url="", state="Failed", message="no space left", in_a_row=in_a_row)


def test_a_row_of_failures_is_told_at_each_doubling() -> None:
    assert [row for row in range(1, 40) if failure(row).told] == [1, 2, 4, 8, 16, 32]
    assert failure(3).subject == "scrub: Failed, 3 in a row"
