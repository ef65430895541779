"""Where a pack comes from and who vouches for it: lineage, digests, signatures, files, versions, recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from modelpress.page import words
from modelpress.page.parts import Item, Link, Section, Table, listed
from modelpress.page.story import Story

LISTED = 200
MOST_RECIPE = 100_000
"""Letters of the recipe."""


def section(story: Story) -> Section:
    """All of the manifest that is neither a tensor nor a number."""
    manifest = story.manifest
    items = [Item("signature", text) for text in story.signatures] or [Item("signature", "none beside the manifest")]
    asked = "checked against the trust file" if story.trusted else "not checked: no trust file was named"
    items.append(Item("signatures were", asked))
    tables: list[Table] = []
    if manifest is not None:
        items = [
            Item("pack", manifest.digest, code=True),
            Item("format", f"version {manifest.format_version}, {manifest.kind}"),
            Item("licence of the source", words.cut(manifest.licence)),
            *items,
        ]
        if manifest.encryption is not None:
            items.append(Item("encryption", f"{manifest.encryption.algorithm}, secret {manifest.encryption.secret}"))
        if manifest.base is not None:
            items.append(Item("difference to", manifest.base, code=True))
        tables = [_lineage(manifest.lineage), _versions(manifest.versions), _files(story), _shards(story)]
    if story.run is not None:
        items += [Item(name, "", link=Link(name, address)) for name, address in story.run.links.items()]
    return Section(
        key="origin",
        title="Where it comes from",
        items=items,
        tables=[table for table in tables if table.rows],
        code=[("Recipe", _recipe(story.config))] if story.config else [],
    )


def _recipe(config: Mapping[str, Any]) -> str:
    try:
        return words.cut(json.dumps(dict(config), indent=2, ensure_ascii=False, sort_keys=True), MOST_RECIPE)
    except RecursionError:  # a manifest may nest as deep as it likes
        return "nested too deep to be shown"


def _lineage(lineage: Mapping[str, Any]) -> Table:
    rows = [[words.cut(str(stage)), words.cut(str(digest))] for stage, digest in lineage.items()]
    return listed("Lineage: sha256 of each stage's output", ["stage", "sha256"], rows, LISTED)


def _versions(versions: Mapping[str, str]) -> Table:
    rows = [[words.cut(name), words.cut(version)] for name, version in versions.items()]
    return listed("Versions that shaped the bytes", ["package", "version"], rows, LISTED, folded=True)


def _files(story: Story) -> Table:
    assert story.manifest is not None
    rows = [
        [words.cut(file.name, 160), f"{file.size_bytes:,}", f"{file.stored_bytes:,}", file.sha256]
        for file in story.manifest.blob_files()
    ]
    heads = ["file", "bytes", "stored bytes", "sha256"]
    return listed(f"{len(rows):,} files", heads, rows, LISTED, frozenset({1, 2}), folded=True)


def _shards(story: Story) -> Table:
    assert story.manifest is not None
    shards = story.manifest.shards
    rows = [[str(number), f"{one.size_bytes:,}", one.sha256] for number, one in enumerate(shards)]
    heads = ["shard", "bytes", "sha256 of the blob"]
    return listed(f"{len(rows):,} shards", heads, rows, LISTED, frozenset({1}), folded=True)
