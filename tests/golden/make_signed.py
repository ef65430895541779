"""Makes `signed/`: a signature of the pack `v2`, and a log whose second entry is signed. Run once; never made again.

    python -m tests.golden.make_signed

The key is no secret: it stands here, and counts nowhere else.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path

import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from modelpress import keys
from modelpress.pointer import Pointer
from modelpress.store.local import LocalStore
from modelpress.trust import Signer, sign_pack
from modelpress.trust.policy import entry_of
from tests.golden.test_golden import DIGESTS

HERE = Path(__file__).parent


def make(folder: Path) -> None:
    """Write signature, entries and trust file."""
    signer = Signer(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
    sign_pack(LocalStore(folder), signer, "golden", DIGESTS["v2"])
    first = Pointer(
        name="golden",
        alias="champion",
        number=1,
        pack=DIGESTS["v1"],
        previous=None,
        reason="promote",
        decision={"promote": True, "reasons": ["at most 0.5 % worse, “so far”"]},
        created=datetime(2026, 11, 21, tzinfo=UTC),
        who="golden@nowhere",
        token="1",
    )
    changes = {"number": 2, "pack": DIGESTS["v2"], "previous": first.digest, "decision": None, "token": "2"}
    for entry in (first, first.model_copy(update=changes).signed(signer)):
        path = folder / keys.pointer(entry.name, entry.alias, entry.number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(entry.to_bytes())
    key = entry_of(signer, "golden", "publisher", ["golden"]).model_dump(mode="json", exclude_none=True)
    document = {"format_version": 1, "required": ["publisher"], "pointers": ["publisher"], "keys": [key]}
    (folder / "trust.yaml").write_text(yaml.safe_dump(document, sort_keys=False))


if __name__ == "__main__":
    target = HERE / "signed"
    if target.exists():
        sys.exit(f"{target} exists; golden files are never made again")
    make(target)
