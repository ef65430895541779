"""A promotion under a trust file: who may not move the alias moves nothing, in the store or in MLflow."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from modelpress import pointer
from modelpress.errors import KeyRefusedError, UnsignedError
from registry import promotion
from tests.registry.test_promotion import GATE, NAME, client, named, publish
from tests.trust.teams import Team

__all__ = ["client"]


def test_whoever_may_not_move_the_alias_moves_nothing(tmp_path: Path, client: MlflowClient) -> None:
    team = Team(tmp_path, farm="publisher", anna="approver")
    pack = publish(team.store("farm"), client, tmp_path, seed=0)
    unsigned = publish(team.store(), client, tmp_path, seed=1)
    for owner, digest, kind in (
        (None, pack, UnsignedError),
        ("anna", pack, KeyRefusedError),
        ("farm", unsigned, UnsignedError),
    ):
        with pytest.raises(kind):
            promotion.promote(team.store(owner), client, NAME, digest, GATE)
        assert (named(client), named(client, "challenger")) == (None, None)
        assert pointer.current(team.store(), NAME, "champion") is None
    assert promotion.promote(team.store("farm"), client, NAME, pack, GATE).promote
    entry = pointer.current(team.store(), NAME, "champion")
    assert entry is not None
    assert (entry.pack, named(client)) == (pack, pack)
    assert entry.signature is not None
