"""Who vouches for what is published: signatures over manifests and pointer entries, and the keys that count.

A manifest holds the digest of every byte of its pack, so one signature over the manifest's digest covers the pack. The
publisher signs when `MODELPRESS_SIGNING_KEY_FILE` names a key; others add theirs later. A reader whose
`MODELPRESS_TRUST` names a file of trusted keys uses nothing that they did not sign. `open_store` gives both to the
store, and whatever reads through it is held to them: no caller can forget to ask.
"""

from modelpress.trust.packs import Signed, check_pack, sign_pack, signatures_of
from modelpress.trust.policy import Policy, TrustedKey, read_policy
from modelpress.trust.signer import Signer, new_key
from modelpress.trust.trusted import Trust

__all__ = [
    "Policy",
    "Signed",
    "Signer",
    "Trust",
    "TrustedKey",
    "check_pack",
    "new_key",
    "read_policy",
    "sign_pack",
    "signatures_of",
]
