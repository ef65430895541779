"""A team of the tests: its keys, and the file that says what they count for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from modelpress.manifest import Manifest
from modelpress.store.local import LocalStore
from modelpress.trust import Signer, Trust, new_key
from modelpress.trust.seen import Seen

NAME = "demo"


def manifest(note: str = "", name: str = NAME) -> Manifest:
    """A pack without tensors: what is signed is its digest, whatever it holds."""
    return Manifest(name=name, kind="torch", shards=(), tensors=(), files=(), licence=note or "MIT")


class Team:
    """Keys by name, and a trust file that is written anew at each change."""

    def __init__(self, folder: Path, **roles: str) -> None:
        self.folder = folder
        self.path = folder / "trust.yaml"
        self.signers: dict[str, Signer] = {}
        self.document: dict[str, Any] = {"format_version": 1, "required": [], "pointers": [], "keys": []}
        for owner, role in roles.items():
            self.add(owner, role)
        self.set(required=["publisher"], pointers=["publisher"])

    def add(self, owner: str, role: str = "publisher", **fields: object) -> Signer:
        signer = new_key(self.folder / f"{owner}.pem")
        entry = {"id": signer.key_id, "owner": owner, "role": role, "public_key": signer.public_key, "packs": ["*"]}
        self.document["keys"].append(entry | fields)
        self.signers[owner] = signer
        return signer

    def set(self, **fields: object) -> None:
        self.document |= fields
        self.path.write_text(yaml.safe_dump(self.document))

    def change(self, owner: str, **fields: object) -> None:
        (entry,) = [key for key in self.document["keys"] if key["owner"] == owner]
        entry |= fields
        self.set()

    def trust(self) -> Trust:
        return Trust(self.path, Seen(self.folder / "seen"))

    def store(self, owner: str | None = None, *, trusting: bool = True) -> LocalStore:
        """The team's store, as one of them opens it; without a name, as a reader does."""
        store = LocalStore(self.folder / "store")
        store.signer = self.signers[owner] if owner else None
        store.trust = self.trust() if trusting else None
        return store
