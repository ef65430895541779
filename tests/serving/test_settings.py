"""What the server's settings come to on this machine."""

from __future__ import annotations

import pytest

from serving.main import ServingSettings


@pytest.mark.parametrize(
    ("cores", "given", "inferences", "threads"),
    [
        (2, {}, 2, 1),
        (8, {"workers": 2}, 2, 4),
        (8, {"workers": 3}, 3, 2),
        (2, {"workers": 5}, 5, 1),
        (8, {"threads": 8}, 8, 8),
        (8, {"workers": 1}, 1, 8),
    ],
)
def test_inferences_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, given: dict[str, int], inferences: int, threads: int
) -> None:
    monkeypatch.setattr("serving.main.usable_cores", lambda: cores)
    settings = ServingSettings(**given)
    assert (settings.inferences, settings.intra_threads) == (inferences, threads)
