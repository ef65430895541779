from __future__ import annotations

from pathlib import Path

import pytest

from tests.trust.teams import Team


@pytest.fixture
def team(tmp_path: Path) -> Team:
    """A publisher and an approver; a pack needs the publisher alone."""
    return Team(tmp_path, farm="publisher", anna="approver")
