"""Ranges that arrive in parallel: what fails is told, whenever it does."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import pytest

from modelpress.store.receive import receive


class BrokenError(Exception):
    """The line broke."""


class Failing(Future[Any]):
    """Fails right behind the n-th look at whether it is done."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.left = looks

    def done(self) -> bool:
        found = super().done()
        self.left -= 1
        if not self.left:
            self.set_exception(BrokenError())
        return found


class Pool(Executor):
    """Fetches nothing."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        del fn, args, kwargs
        return Failing(self.looks)


@pytest.mark.parametrize("looks", range(1, 13))
def test_a_range_that_fails_at_any_moment_is_not_taken_for_a_whole_one(looks: int) -> None:
    view = memoryview(bytearray(8))
    with pytest.raises(BrokenError):
        receive(Pool(looks), lambda *_: None, iter([(0, view)]), 1, lambda _: None)
