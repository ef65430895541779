"""Stage records: a key changes with everything that decides an output, and a record counts only with its outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpress import keys
from modelpress.errors import CorruptionError
from modelpress.reports import ArtifactRef, SourceReport
from modelpress.store.artifacts import load_artifact, save_artifact
from modelpress.store.base import Store, open_store
from tasks import records
from tasks.records import Record, find_record, read_report, save_record, stage_key

KEY = "a" * 64


def ref(digest: str) -> ArtifactRef:
    return ArtifactRef(uri=f"s3://anywhere/{digest}", sha256=digest, size_bytes=1)


PARTS: dict[str, Any] = {
    "stage": "prune",
    "inputs": [ref("0" * 64), ref("1" * 64)],
    "config": "fingerprint",
    "identity": "digits",
    "extra": {"stage": "source"},
}


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("stage", "distill"),
        ("inputs", [ref("1" * 64), ref("0" * 64)]),
        ("inputs", [ref("0" * 64)]),
        ("config", ""),
        ("identity", "digits of another seed"),
        ("extra", {}),
    ],
)
def test_the_key_changes_with_every_part(part: str, other: Any) -> None:
    assert stage_key(**{**PARTS, part: other}) != stage_key(**PARTS)


def test_the_key_changes_with_the_library_and_not_with_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    before = stage_key(**PARTS)
    moved = [reference.model_copy(update={"uri": "/elsewhere"}) for reference in PARTS["inputs"]]
    assert stage_key(**{**PARTS, "inputs": moved}) == before
    monkeypatch.setattr(records, "__version__", "9.9.9")
    assert stage_key(**PARTS) != before


@pytest.mark.parametrize("library", ["torch", "onnx", "onnxscript"])
def test_the_key_changes_with_the_libraries_that_make_the_bytes(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, installed = stage_key(**PARTS), records.library_versions()
    assert installed[library]
    assert installed["onnxruntime"] or installed["onnxruntime-gpu"]
    monkeypatch.setattr(records, "library_versions", lambda: installed | {library: "0.0.1"})
    assert stage_key(**PARTS) != before


@given(st.lists(st.text("0123456789abcdef", min_size=64, max_size=64), max_size=4), st.text(), st.text())
def test_the_key_is_a_sha256_of_any_parts(digests: list[str], config: str, identity: str) -> None:
    key = stage_key("prune", inputs=[ref(digest) for digest in digests], config=config, identity=identity)
    assert keys.is_digest(key)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "work"))


def finished(store: Store, content: bytes = b"weights") -> Record:
    return Record(stage="prune", key=KEY, outputs={"output": save_artifact(store, content)}, report={}, seconds=1.5)


def test_a_saved_record_is_found_with_its_outputs(store: Store) -> None:
    record = finished(store)
    assert find_record(store, "prune", KEY) is None
    assert save_record(store, record, replace=False) == record
    assert find_record(store, "prune", KEY) == record


def test_of_two_that_raced_the_first_counts(store: Store) -> None:
    first, second = finished(store, b"first"), finished(store, b"second")
    save_record(store, first, replace=False)
    assert save_record(store, second, replace=False) == first
    assert save_record(store, second, replace=True) == second
    assert find_record(store, "prune", KEY) == second


def test_a_record_whose_output_is_gone_or_cut_does_not_count(store: Store) -> None:
    record = finished(store)
    save_record(store, record, replace=False)
    store.put(keys.blob(record.outputs["output"].sha256), b"wei")
    assert find_record(store, "prune", KEY) is None
    store.delete(keys.blob(record.outputs["output"].sha256))
    assert find_record(store, "prune", KEY) is None
    again = finished(store)
    assert save_record(store, again, replace=False) == again


def test_a_work_store_that_was_moved_keeps_its_worth(store: Store, tmp_path: Path) -> None:
    save_record(store, finished(store), replace=False)
    (tmp_path / "work").rename(tmp_path / "moved")
    found = find_record(open_store(str(tmp_path / "moved")), "prune", KEY)
    assert found is not None
    assert load_artifact(found.outputs["output"]) == b"weights"


def test_damage_in_an_output_is_named_with_the_way_out_and_mended(store: Store) -> None:
    reference = save_artifact(store, b"weights")
    store.put(keys.blob(reference.sha256), b"wEights")
    with pytest.raises(CorruptionError, match=r"(?s)delete this object and run again.*MODELPRESS_REUSE=false"):
        load_artifact(reference)
    assert save_artifact(store, b"weights", replace=True) == reference
    assert load_artifact(reference) == b"weights"


def test_a_report_of_another_kind_is_an_error_with_the_way_out(store: Store) -> None:
    with pytest.raises(CorruptionError, match=rf"(?s)stages/prune/{KEY}.*delete it, and the stage runs again"):
        read_report(store, finished(store), SourceReport)


def test_a_damaged_record_is_an_error_with_the_way_out(store: Store) -> None:
    store.put(f"stages/prune/{KEY}.json", b'{"stage": "prune"}')
    with pytest.raises(CorruptionError, match="delete it, and the stage runs again"):
        find_record(store, "prune", KEY)
