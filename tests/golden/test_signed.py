"""Signatures that were made once keep counting, for this library and for a verifier written from FORMAT.md alone."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest
import yaml
from cryptography.exceptions import InvalidSignature

from modelpress import keys, load, pointer
from modelpress.store.local import LocalStore
from modelpress.trust import Trust
from modelpress.trust.seen import Seen
from tests.golden import second_verifier
from tests.golden.make_signed import HERE, make
from tests.golden.test_golden import DIGESTS

SIGNED = HERE / "signed"
(KEY,) = yaml.safe_load((SIGNED / "trust.yaml").read_text())["keys"]
PUBLIC_KEY = base64.b64decode(KEY["public_key"])


def test_they_keep_counting(tmp_path: Path) -> None:
    store = LocalStore(SIGNED)
    store.trust = Trust(SIGNED / "trust.yaml", Seen(tmp_path))
    (signed,) = load.check_trust(store, "golden", DIGESTS["v2"])
    assert signed.key_id == KEY["id"]
    entries = pointer.history(store, "golden", "champion")
    assert [(entry.format_version, entry.pack) for entry in entries] == [(1, DIGESTS["v1"]), (2, DIGESTS["v2"])]


def test_they_are_written_the_same_today(tmp_path: Path) -> None:
    make(tmp_path)
    paths = sorted(path.relative_to(SIGNED) for path in SIGNED.rglob("*") if path.is_file())
    assert len(paths) == 4
    assert [(tmp_path / path).read_bytes() for path in paths] == [(SIGNED / path).read_bytes() for path in paths]


def test_the_second_verifier_says_the_same(tmp_path: Path) -> None:
    second_verifier.check_signature(SIGNED, "golden", DIGESTS["v2"], PUBLIC_KEY)
    assert len(second_verifier.read_log(SIGNED, "golden", "champion", PUBLIC_KEY)) == 2
    shutil.copytree(SIGNED, tmp_path / "copy")
    path = tmp_path / "copy" / keys.pointer("golden", "champion", 2)
    changed = json.loads(path.read_bytes()) | {"pack": DIGESTS["v1"]}
    path.write_text(json.dumps(changed, sort_keys=True, separators=(",", ":")))
    with pytest.raises(InvalidSignature):
        second_verifier.read_log(tmp_path / "copy", "golden", "champion", PUBLIC_KEY)
