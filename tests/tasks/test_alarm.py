"""What is told of a row of failures, and through what."""

from __future__ import annotations

import pytest
from prefect.testing.utilities import prefect_test_harness

from modelpress.errors import ConfigError
from tasks.alarm import Failure, notify


def failure(in_a_row: int) -> Failure:
    return Failure(deployment="scrub", run="owl", url="", state="Failed", message="no space left", in_a_row=in_a_row)


def test_a_row_of_failures_is_told_at_each_doubling() -> None:
    assert [row for row in range(1, 40) if failure(row).told] == [1, 2, 4, 8, 16, 32]
    assert failure(3).subject == "scrub: Failed, 3 in a row"


def test_a_block_that_is_not_there_or_sends_nothing_is_an_error_by_name() -> None:
    from prefect.blocks.system import Secret

    with prefect_test_harness():
        with pytest.raises(ConfigError, match="slack-webhook/none"):
            notify.fn("slack-webhook/none", failure(1))
        Secret(value="hidden").save("alarm-test")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="a Secret") as refused:
            notify.fn("secret/alarm-test", failure(1))
        assert "hidden" not in str(refused.value)
