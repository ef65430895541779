"""The scrub as a Prefect flow: what a person finds in the UI afterwards, and how a run that was cut off goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.objects import Artifact
from prefect.client.schemas.sorting import ArtifactSort

from flows.scrub import scrub
from modelpress import keys, pointer
from modelpress.errors import CorruptionError
from modelpress.reports.scrub import ScrubState
from modelpress.scrub import state_key
from modelpress.store import open_store
from tests.packs import make_pack
from tests.trust.teams import Team


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Team:
    team = Team(tmp_path, farm="publisher")
    monkeypatch.setenv("MODELPRESS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELPRESS_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MODELPRESS_TRUST", str(team.path))
    monkeypatch.delenv("MODELPRESS_WORK", raising=False)
    return team


def artifact(key: str) -> Artifact:
    """The newest artifact of a key."""
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])),
            sort=ArtifactSort.CREATED_DESC,
            limit=1,
        )
    return found[0]


def test_a_scrub_shows_what_it_found_and_fails_by_name(team: Team, tmp_path: Path, prefect_server: str) -> None:
    store = team.store("farm")
    (tmp_path / "shards").mkdir()
    pack = make_pack(tmp_path / "shards")
    pack.publish(store)
    pointer.append(store, "demo", "champion", pack.digest, "promote")
    report = scrub(bytes_per_second=0)
    assert (report.errors, report.read_blobs) == (0, len(pack.manifest.blobs()))
    (row,) = json.loads(str(artifact("scrub-packs").data))
    assert (row["pack"], row["errors"], row[""]) == (pack.digest, 0, "█" * 20)
    assert "Everything is in order" in str(artifact("scrub-report").data)

    key = keys.blob(pack.manifest.shards[0].sha256)
    data = store.get(key)
    store.put(key, data[:-1] + bytes([data[-1] ^ 1]))
    work = open_store(str(tmp_path / "home" / "work"))
    place = state_key(store.uri)
    state = ScrubState.model_validate_json(work.get(place))
    assert state.finished is not None
    others = sorted(info.key for info in store.list(keys.BLOBS) if info.key != key)
    cut_off = state.model_copy(update={"finished": None, "after": others[0], "read_blobs": 1})
    work.put(place, cut_off.model_dump_json().encode())
    with pytest.raises(CorruptionError, match=key) as caught:
        scrub(bytes_per_second=0, afresh=key <= others[0])
    assert f"demo@{pack.digest[:12]}" in str(caught.value)
    (row,) = json.loads(str(artifact("scrub-packs").data))
    assert row["errors"] == 1
    (finding,) = json.loads(str(artifact("scrub-findings").data))
    assert (finding["kind"], finding["key"]) == ("damaged", key)
    work.put(place, b"{")
    with pytest.raises(CorruptionError, match="what a scrub wrote"):
        scrub()
