"""The page of a run that has published: whatever the store or the plots refuse, it is told, and ends nothing else."""

from __future__ import annotations

import base64
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from flows import pages
from flows.pages import Drawn, draw_and_keep
from modelpress import keys, run_records, scrub
from modelpress.cipher import LocalKey, seal_pack, secrets
from modelpress.errors import NotFoundError, PageError, StoreFullError
from modelpress.page import drawing, read_story, render, report_page
from modelpress.publish import publish
from modelpress.reports import RunReport
from modelpress.settings import Settings
from modelpress.store import Store, open_store
from tests.flows.test_result import ROWS
from tests.packs import make_pack
from tests.page.stories import NAME, publish_story, run_report


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
def store(settings: Settings) -> Store:
    return open_store(settings.store_uri, settings)


def short(pack: str | None, stopped: str | None = None) -> RunReport:
    """A run of few plots."""
    whole = run_report(pack, stopped=stopped)
    return whole.model_copy(update={"stages": whole.stages[:2], "served": None})


@pytest.fixture
def run(store: Store, tmp_path: Path) -> RunReport:
    """A run that has published."""
    return short(publish_story(store, tmp_path / "shards"))


def kept(store: Store, run: RunReport) -> list[run_records.RunRecord]:
    assert run.pack is not None
    return [one.record for one in run_records.kept(store, NAME, run.pack) if one.record is not None]


def problem(drawn: Drawn) -> str:
    """The only one."""
    (found,) = drawn.problems
    return str(found)


@contextmanager
def full_disk(most_bytes: int) -> Iterator[None]:
    """No file may grow beyond this: a write fails as it does on a full disk (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_run_is_kept_once_unless_it_has_something_new(settings: Settings, store: Store, run: RunReport) -> None:
    drawn = draw_and_keep(settings, run, keep=False)
    assert drawn.problems == []
    (record,) = kept(store, run)
    assert drawn.page is not None
    assert run_records.read_page(store, record) == drawn.page.encode()
    assert record.format_version == 1, "as an earlier release reads it"
    assert draw_and_keep(settings, run, keep=False) == drawn
    assert len(kept(store, run)) == 1
    draw_and_keep(settings, run, keep=True)
    assert len(kept(store, run)) == 2


def test_a_full_disk_costs_the_record_and_the_next_run_keeps_it(
    settings: Settings, store: Store, run: RunReport
) -> None:
    with full_disk(2_000):
        drawn = draw_and_keep(settings, run, keep=True)
    assert drawn.page is not None
    assert str(run.pack) in drawn.page, "MLflow gets it all the same"
    told = problem(drawn)
    assert told.startswith(f"keeping the run, and its page, beside pack {NAME}@{run.pack}")
    for text in (StoreFullError.__name__, "free space", "start the same recipe again", f"modelpress report {NAME}@"):
        assert text in told
    assert kept(store, run) == []
    assert draw_and_keep(settings, run, keep=False).problems == [], "a run that recomputes nothing"
    assert len(kept(store, run)) == 1


def test_a_place_that_can_not_be_written_is_told(settings: Settings, store: Store, run: RunReport) -> None:
    in_the_way = Path(settings.store_uri, keys.manifests(NAME), "runs")
    in_the_way.write_bytes(b"")
    told = problem(draw_and_keep(settings, run, keep=True))
    assert "ConflictError" in told
    assert str(in_the_way) in told
    in_the_way.unlink()
    assert draw_and_keep(settings, run, keep=False).problems == []


def test_a_page_that_was_tampered_with_is_not_written_over(settings: Settings, store: Store, run: RunReport) -> None:
    draw_and_keep(settings, run, keep=True)
    (record,) = kept(store, run)
    assert record.page is not None
    assert run.pack is not None
    key = keys.page(NAME, run.pack, record.page)
    store.put(key, b"<script>")
    told = problem(draw_and_keep(settings, run, keep=True))
    assert "other bytes under" in told
    assert "keep it for inquiry" in told
    assert store.get(key) == b"<script>"


def test_a_pack_that_can_not_be_read_leaves_the_run_alone_on_the_page(
    settings: Settings, store: Store, run: RunReport
) -> None:
    assert run.pack is not None
    store.put(keys.manifest(NAME, run.pack), b"{}")
    drawn = draw_and_keep(settings, run, keep=True)
    told = problem(drawn)
    assert told.startswith(f"reading what lies beside pack {NAME}@{run.pack}")
    assert "CorruptionError" in told
    assert drawn.page is not None
    assert "could not be read, and is not told here: CorruptionError" in drawn.page
    assert "The way, stage by stage" in drawn.page
    assert kept(store, run) == [], "whether it may be told in the clear stands in the manifest"


def test_a_page_that_can_not_be_drawn_leaves_the_numbers(
    settings: Settings, store: Store, run: RunReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    def savefig(*_: object, **__: object) -> None:
        raise OverflowError("cannot convert float infinity to integer")

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        drawn = draw_and_keep(settings, run, keep=True)
        stopped = draw_and_keep(settings, short(None, stopped="no"), keep=True)
    told = problem(drawn)
    assert drawn.page is None
    assert "found: OverflowError in svg.py:" in told
    assert "cannot convert float infinity" in told
    assert f"modelpress report {NAME}@{run.pack}" in told
    assert isinstance(drawn.problems[0].__cause__, OverflowError), "with its traceback"
    (record,) = kept(store, run)
    assert (record.page, record.format_version, record.run) == (None, 2, run)
    with pytest.raises(NotFoundError, match="could not be drawn"):
        run_records.read_page(store, record)
    assert scrub.scrub(store).findings == (), "a run without a page is in order"
    story = read_story(store, NAME, str(run.pack))
    assert story.run == run
    assert "The way, stage by stage" in render(report_page(story)), "and it can be drawn later"
    assert stopped.page is None
    assert "with the runs of the stages in MLflow" in problem(stopped)


def test_the_page_of_an_encrypted_pack_lies_sealed_beside_it(
    settings: Settings, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELPRESS_KEY", base64.b64encode(b"K" * 32).decode())
    made = make_pack(tmp_path / "shards", name=NAME)
    secret = secrets.current(store, NAME, [LocalKey(b"K" * 32)])
    manifest, shards, blobs = seal_pack(made.manifest, made.shards, made.blobs, secret, tmp_path / "sealed")
    publish(store, manifest, shards, blobs, source_bytes=1)
    run = short(manifest.digest)
    drawn = draw_and_keep(settings, run, keep=True)
    assert drawn.problems == []
    assert drawn.page is not None
    (record,) = kept(store, run)
    assert run_records.read_page(store, record) == drawn.page.encode()
    stored = [store.get(info.key) for info in store.list(keys.runs(NAME, manifest.digest))]
    assert not [data for data in stored if b"accuracy" in data or b"<html" in data]
    assert scrub.scrub(store).findings == ()
    story = read_story(store, NAME, manifest.digest)
    assert (story.run, story.sealed) == (run, None)
    monkeypatch.delenv("MODELPRESS_KEY")
    story = read_story(store, NAME, manifest.digest)
    assert story.run is None
    assert "The pack is encrypted, and its reports can&#39;t be read here: keys in" in render(report_page(story))
    with_page = draw_and_keep(settings, run, keep=True)
    assert "EncryptionKeyError" in problem(with_page), "never in the clear instead"
    assert len(kept(store, run)) == 1


def test_plots_that_can_not_be_drawn_are_told(tmp_path: Path) -> None:
    assert pages.draw_plots(tmp_path, NAME, ROWS, {}) == []
    assert (tmp_path / pages.STAGES).is_file()
    with full_disk(100):
        (found,) = pages.draw_plots(tmp_path, NAME, ROWS, {})
    assert "drawing the plots of digits" in str(found)
    assert "File too large" in str(found)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, NotFoundError])
def test_what_stops_a_process_or_says_more_goes_through(error: type[BaseException]) -> None:
    with pytest.raises(error), drawing("drawing"):
        raise error("stop")
    with pytest.raises(PageError, match=r"ZeroDivisionError in test_pages\.py:\d+: division"), drawing("drawing"):
        _ = 1 / 0
