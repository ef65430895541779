"""New versions as differences: what comes back, what it costs, what is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from typing_extensions import Buffer

from modelpress import delta, explain, keys, load, pointer
from modelpress.checkpoint import Checkpoint
from modelpress.codec.difference import add_, subtract
from modelpress.compress import compress
from modelpress.container import Coded
from modelpress.dtypes import DTYPES
from modelpress.errors import ConfigError, CorruptionError, NotFoundError
from modelpress.manifest import Manifest, needs
from modelpress.store import Store
from modelpress.store.local import LocalStore
from tests.delta.versions import codes, first, make_delta, moved, second
from tests.packs import COMPRESS, Pack, assert_same, make_pack


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def base(tmp_path: Path, store: Store) -> Pack:
    pack = make_pack(tmp_path / "base", first())
    pack.publish(store)
    pointer.append(store, "demo", "champion", pack.digest, "promote")
    return pack


@pytest.fixture
def version(tmp_path: Path, store: Store, base: Pack) -> Pack:
    pack, _ = make_delta(tmp_path / "version", store, second(), base)
    pack.publish(store)
    return pack


@given(
    data=st.data(),
    dtype=st.sampled_from(list(DTYPES)),
    size=st.integers(0, 70),
)
@settings(max_examples=120, deadline=None)
def test_a_difference_and_its_base_give_every_bit_back(data: st.DataObject, dtype: str, size: int) -> None:
    kind = DTYPES[dtype]
    words = arrays.arrays(np.uint8, size * kind.itemsize)
    raw, base = data.draw(words), data.draw(words)
    before = base.copy()
    difference = subtract(raw, base, kind)
    assert np.array_equal(base, before)
    assert np.array_equal(add_(base.copy(), difference, kind), raw)
    assert not subtract(raw, raw, kind).any()


def test_a_version_comes_back_bit_by_bit(store: Store, base: Pack, version: Pack) -> None:
    steps: list[tuple[int, int]] = []
    manifest, found = load.load_checkpoint(
        store, "demo", version.digest, lambda done, total, _note="": steps.append((done, total))
    )
    assert manifest.base == base.digest
    assert needs(manifest) == (base.digest,)
    assert needs(base.manifest) == ()
    assert_same(found, second())
    assert steps == sorted(steps)
    original = load.open_parts(store, manifest).base
    assert original is not None
    total = sum(manifest.blobs().values()) + sum(original.blobs.values())
    assert manifest.reports is not None
    assert steps[-1] == (total - manifest.reports.stored_bytes, total)


def test_what_is_equal_is_not_sent_and_what_moved_little_costs_little(
    tmp_path: Path, store: Store, base: Pack, version: Pack
) -> None:
    entries = {entry.name: entry for entry in version.manifest.tensors}
    whole = {entry.name: entry for entry in base.manifest.tensors}
    for name in ("layer.0.scale", "none", "new.name"):
        assert entries[name].is_base
        assert (entries[name].stored_bytes, entries[name].shards) == (0, ())
    assert entries["new.name"].base == "old.name"
    assert entries["table.copy"].base is None, "a tensor of the base serves one"
    for name in ("layer.0.codes", "layer.1.packed", "layer.2.index", "table"):
        assert entries[name].base == name
        assert entries[name].shards
        assert entries[name].stored_bytes < 0.4 * whole[name].stored_bytes
    assert entries["new"].base is None
    unchanged, report = make_delta(tmp_path / "same", store, first(), base)
    assert unchanged.shards == []
    assert report.delta
    assert (report.delta.delta_bytes, report.delta.equal) == (0, len(base.manifest.tensors))
    sent = unchanged.publish(store)
    assert sent.sent_objects == 1, "the reports"
    assert_same(load.load_checkpoint(store, "demo", unchanged.digest)[1], first())


def test_the_same_version_made_again_is_the_same_pack(tmp_path: Path, store: Store, base: Pack, version: Pack) -> None:
    again, report = make_delta(tmp_path / "again", store, second(), base)
    assert again.digest == version.digest
    assert again.publish(store).sent_objects == 0
    assert report.delta
    assert report.delta.share < 0.5


def test_a_version_of_a_version_is_a_difference_to_the_base(
    tmp_path: Path, store: Store, base: Pack, version: Pack
) -> None:
    pointer.append(store, "demo", "champion", version.digest, "promote")
    for ref in ("champion", version.digest[:12], base.digest):
        assert delta.find_base(store, "demo", ref) == base.digest
    with pytest.raises(ConfigError, match="that pack's digest"):
        delta.compress_against(second(), COMPRESS, delta.open_base(store, "demo", base.digest))
    with pytest.raises(ConfigError, match="compress_against with that pack"):
        compress(second(), COMPRESS.model_copy(update={"base": base.digest}))
    with pytest.raises(ConfigError, match="one that stands alone"):
        delta.compress_against(
            second(),
            COMPRESS.model_copy(update={"base": version.digest}),
            delta.open_base(store, "demo", version.digest),
        )


def test_a_version_that_moved_far_stands_alone_and_says_why(tmp_path: Path, store: Store, base: Pack) -> None:
    far = second()
    far.tensors["layer.0.codes"] = far.tensors["layer.0.codes"].flip(0)
    config = COMPRESS.model_copy(update={"max_delta_share": 0.05})
    pack, report = make_delta(tmp_path / "far", store, far, base, config)
    assert pack.manifest.base is None
    assert pack.manifest.format_version == 2
    assert report.delta
    assert not report.delta.chosen
    assert "5.0% that compress.max_delta_share allows" in report.delta.reason
    assert all(row.base is None for row in report.tensors)


def test_a_difference_that_decodes_too_slowly_is_not_taken(tmp_path: Path, store: Store, base: Pack) -> None:
    config = COMPRESS.model_copy(update={"min_decode_bytes_per_second": 0.6e9})
    pack, _ = make_delta(tmp_path / "slow", store, second(), base, config)
    for entry in pack.manifest.tensors:
        if entry.base is not None and entry.shards:  # two codecs of 1e9 together do half of that
            assert next(one.codec for one in base.manifest.tensors if one.name == entry.base) == "raw"


def test_coded_differences_round_trip(store: Store, base: Pack) -> None:
    config = COMPRESS.model_copy(update={"base": base.digest})
    coded, _ = delta.compress_against(second(), config, delta.open_base(store, "demo", base.digest))
    again = Coded.from_bytes(coded.to_bytes())
    assert again.to_bytes() == coded.to_bytes()
    assert [(one.name, one.base, one.is_base) for one in again.tensors] == [
        (one.name, one.base, one.is_base) for one in coded.tensors
    ]
    assert again.base == base.digest


def test_verify_pull_and_inspect_read_both(tmp_path: Path, store: Store, base: Pack, version: Pack) -> None:
    report = load.verify(store, "demo", version.digest)
    assert report.tensors == len(version.manifest.tensors)
    assert version.manifest.published_bytes < report.read_bytes
    load.pull(store, "demo", version.digest, tmp_path / "pulled")
    import safetensors.torch

    found = safetensors.torch.load_file(tmp_path / "pulled" / "model.safetensors")
    assert_same(Checkpoint("torch", found, second().files, second().metadata), second())
    parts = load.open_parts(store, version.manifest)
    choices = explain.read_choices(version.manifest, parts.fetch)
    for name, expected in (("layer.0.codes", "difference to layer.0.codes of"), ("layer.0.scale", "bit by bit")):
        entry = explain.find_tensor(version.manifest, name)
        found_text = explain.describe(version.manifest, entry, choices[name], parts.fetch, parts.base)
        text = "\n".join(explain.lines(found_text))
        assert expected in text
    assert any(row["codec"] == "equal" for row in explain.table(version.manifest, choices))


def test_only_the_shards_of_the_base_that_are_needed_are_read(
    tmp_path: Path, store: Store, base: Pack, version: Pack
) -> None:
    only = Checkpoint("torch", {"table": second().tensors["table"]})
    pack, _ = make_delta(tmp_path / "only", store, only, base)
    pack.publish(store)
    (entry,) = (entry for entry in base.manifest.tensors if entry.name == "table")
    needed = {base.manifest.shards[position].sha256 for position in entry.shards}
    others = {shard.sha256 for shard in base.manifest.shards} - needed
    assert others
    for digest in others:
        store.delete(keys.blob(digest))
    assert load.verify(store, "demo", pack.digest).tensors == 1
    with pytest.raises(NotFoundError, match=version.digest):
        load.verify(store, "demo", version.digest)


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["manifest gone", "manifest changed", "shard gone", "shard changed"])
def test_a_base_that_is_gone_or_damaged_is_named_with_the_pack(
    store: Store, base: Pack, version: Pack, kind: str
) -> None:
    what, how = kind.split()
    key = keys.manifest("demo", base.digest) if what == "manifest" else keys.blob(base.manifest.shards[0].sha256)
    data = bytearray(store.get(key))
    store.delete(key)
    if how == "changed":
        data[len(data) // 2] ^= 4
        store.put(key, bytes(data))
    with pytest.raises(NotFoundError if how == "gone" else CorruptionError) as caught:
        load.load_checkpoint(store, "demo", version.digest)
    message = str(caught.value)
    assert base.digest in message
    assert version.digest in message
    assert caught.value.found
    assert caught.value.fix


def test_a_pack_is_not_published_without_its_base(tmp_path: Path, store: Store, base: Pack) -> None:
    pack, _ = make_delta(tmp_path / "version", store, second(), base)
    other = LocalStore(tmp_path / "other")
    with pytest.raises(NotFoundError, match=base.digest):
        pack.publish(other)
    assert not list(other.list(keys.BLOBS))
    report = pack.publish(store)
    assert report.base_bytes > 0
    assert report.compression_ratio == 1_000_000 / (report.published_bytes + report.base_bytes)


def test_readers_that_are_given_no_base_say_so(store: Store, version: Pack) -> None:
    from modelpress.container import read_tensors

    with pytest.raises(ConfigError, match="found: no base"):
        dict(read_tensors(version.manifest, load.fetcher(store, version.manifest)))


def changed(manifest: Manifest, **fields: object) -> Manifest:
    """The manifest with other fields, checked again."""
    document = manifest.model_dump(mode="json") | fields
    return Manifest.parse(Manifest.model_validate(document).to_bytes())


def put(store: Store, manifest: Manifest) -> str:
    store.put(keys.manifest(manifest.name, manifest.digest), manifest.to_bytes())
    return manifest.digest


def refused(store: Store, digest: str, match: str) -> None:
    """The pack is refused before any blob is read."""
    for info in list(store.list(keys.BLOBS)):
        store.delete(info.key)
    with pytest.raises(CorruptionError, match=match) as caught:
        load.load_checkpoint(store, "demo", digest)
    assert digest in str(caught.value)


@pytest.mark.faults
def test_a_chain_of_two_is_refused(store: Store, base: Pack, version: Pack) -> None:
    chained = changed(version.manifest, base=version.digest)
    refused(store, put(store, chained), "a base that stands alone")


@pytest.mark.faults
def test_a_base_of_another_name_is_refused(store: Store, base: Pack, version: Pack) -> None:
    other = changed(base.manifest, name="other")
    store.put(keys.manifest("demo", other.digest), other.to_bytes())
    digest = put(store, changed(version.manifest, base=other.digest))
    with pytest.raises(CorruptionError, match="a pack named other"):
        load.load_checkpoint(store, "demo", digest)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "field", "value", "match"),
    [
        ("layer.0.codes", "shape", [300, 200], r"I8 \[200, 300\]"),
        ("layer.0.codes", "dtype", "U8", "found: I8"),
        ("layer.0.codes", "base", "gone", "no such tensor"),
        ("layer.0.scale", "raw_sha256", "0" * 64, "sha256 0000"),
        ("layer.0.scale", "shape", [1 << 40], r"F32 \[1099511627776\]"),
    ],
)
def test_a_base_that_does_not_fit_is_refused(
    store: Store, version: Pack, name: str, field: str, value: object, match: str
) -> None:
    document = version.manifest.model_dump(mode="json")
    entry = next(entry for entry in document["tensors"] if entry["name"] == name)
    entry[field] = value
    refused(store, put(store, changed(version.manifest, tensors=document["tensors"])), match)


@pytest.mark.parametrize(
    ("name", "fields", "match"),
    [
        ("layer.0.codes", {"codec": "raw"}, "a difference stored as 'raw'"),
        ("layer.0.scale", {"codec": "zstd"}, "a difference stored as 'zstd' in 0 pieces"),
        ("layer.0.scale", {"stored_bytes": 1}, "in no shard"),
        ("layer.0.scale", {"base": None}, "in no shard"),
        ("layer.0.scale", {"base": "layer.0.codes"}, "the base's tensors: 'layer.0.codes' stands 2 times"),
    ],
)
def test_entries_that_contradict_themselves_are_refused(
    version: Pack, name: str, fields: dict[str, object], match: str
) -> None:
    document = version.manifest.model_dump(mode="json")
    next(entry for entry in document["tensors"] if entry["name"] == name).update(fields)
    with pytest.raises(ValueError, match=match):
        Manifest.model_validate(document)


def test_a_base_without_differences_and_differences_without_a_base_are_refused(base: Pack, version: Pack) -> None:
    with pytest.raises(ValueError, match="no tensor that is stored as a difference"):
        Manifest.model_validate(base.manifest.model_dump(mode="json") | {"base": "0" * 64, "format_version": 3})
    with pytest.raises(ValueError, match="the manifest names none"):
        Manifest.model_validate(version.manifest.model_dump(mode="json") | {"base": None})


def test_a_version_split_over_shards_comes_back(tmp_path: Path, store: Store) -> None:
    generator = torch.Generator().manual_seed(1)
    old = torch.randint(0, 2**16, (200_000,), generator=generator).to(torch.int32)
    new = old + (torch.rand(old.shape, generator=generator) < 0.3).int() * torch.randint(
        -(2**30), 2**30, old.shape, generator=generator, dtype=torch.int32
    )
    base = make_pack(tmp_path / "base", Checkpoint("torch", {"a": old, "b": old[:9]}))
    base.publish(store)
    config = COMPRESS.model_copy(update={"max_delta_share": 1.0})
    pack, _ = make_delta(tmp_path / "version", store, Checkpoint("torch", {"a": new, "b": old[:9]}), base, config)
    pack.publish(store)
    entry = pack.manifest.tensors[0]
    assert entry.base == "a"
    assert len(entry.shards) > 1
    assert_same(load.load_checkpoint(store, "demo", pack.digest)[1], pack.checkpoint)


@pytest.mark.faults
def test_who_stops_early_waits_for_no_shard_of_the_base(tmp_path: Path, store: LocalStore) -> None:
    """The base's shard never comes: the server says nothing any more."""
    base = make_pack(tmp_path / "base", Checkpoint("torch", {"b": codes(0, 100, 100)}))
    base.publish(store)
    newer = Checkpoint("torch", {"a": codes(1, 10, 10), "b": moved(codes(0, 100, 100), 0.02)})
    version, _ = make_delta(tmp_path / "version", store, newer, base)
    version.publish(store)
    assert [(entry.name, entry.base) for entry in version.manifest.tensors] == [("a", None), ("b", "b")]
    silent = keys.blob(base.manifest.shards[0].sha256)
    asked, closed, held = threading.Event(), threading.Event(), list[bool]()

    class Silent(LocalStore):
        def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
            if key == silent:
                asked.set()
                held.append(not closed.wait(20))
            return super().get(key, start, length)

        def read_into(
            self, key: str, buffer: Buffer, start: int = 0, arrived: Callable[[memoryview], None] = lambda _: None
        ) -> None:
            while key == silent:
                asked.set()
                arrived(memoryview(b""))
            super().read_into(key, buffer, start, arrived)

    stream = load.open_parts(Silent(store.folder), version.manifest).stream()
    name, tensor = next(stream)
    assert (name, torch.equal(tensor, newer.tensors["a"])) == ("a", True)
    assert asked.wait(20)
    stream.close()
    closed.set()
    assert True not in held, "closing waited for the server"
    assert [one.name for one in threading.enumerate() if one.name.startswith(("tensor-sha256", "shard"))] == []
